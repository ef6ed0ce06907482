"""Small evaluations: task files, and a run with sizes that fit tiny models."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from support.tiny import LETTERS

from factorctl.config.evaluate import EvalConfig
from factorctl.pipeline.evaluate.result import EvalResult
from factorctl.pipeline.evaluate.run import evaluate
from factorctl.progress import SilentProgress

SIZES: dict[str, Any] = {"window": 32, "stride": 16, "data_tokens": 600, "calibration_tokens": 1024, "device": "cpu"}


def write_tasks(directory: Path, *, documents: int = 12) -> Path:
    """PIQA and OpenBookQA in the field names of the Hub data sets."""
    draw = random.Random(0)

    def word() -> str:
        return "".join(draw.choices(LETTERS, k=5))

    def rows(make: Any) -> str:
        return "".join(json.dumps(make(index)) + "\n" for index in range(documents))

    directory.mkdir()
    (directory / "piqa.jsonl").write_text(
        rows(lambda index: {"goal": word(), "sol1": word(), "sol2": word(), "label": index % 2})
    )
    (directory / "openbookqa.jsonl").write_text(
        rows(
            lambda index: {
                "id": str(index),
                "question_stem": word(),
                "choices": {"text": [word() for _ in range(4)], "label": ["A", "B", "C", "D"]},
                "answerKey": "ABCD"[index % 4],
            }
        )
    )
    return directory


def run(checkpoint: Path | str, out: Path, **options: Any) -> EvalResult:
    return evaluate(EvalConfig(checkpoint=str(checkpoint), out=out, **(SIZES | options)), SilentProgress())
