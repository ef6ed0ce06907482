"""The benchmark driver makes its rows and its report; the numbers themselves are for quiet machines."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import DenseSource
from support.tiny import LETTERS

DRIVER = Path(__file__).parents[2] / "benchmarks" / "bench_training.py"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(DRIVER.parent))
    spec = importlib.util.spec_from_file_location("bench_training", DRIVER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_training", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "report_path", lambda topic: tmp_path / "reports" / f"{topic}.md")
    return module


def test_rows_and_report(driver: ModuleType, dense_source: DenseSource, tmp_path: Path) -> None:
    draw = random.Random(0)
    texts = [" ".join("".join(draw.choices(LETTERS, k=5)) for _ in range(50)) for _ in range(60)]
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sizes = ["--tokens", "2048", "--calibration-tokens", "1024", "--heldout-tokens", "1024", "--block-length", "256"]
    common = ["--data", str(data), "--model", str(dense_source()), "--work", str(tmp_path / "work"), "--threads", "1"]
    for name in ("factorllm-1R4E2K", "default-1R4E2K", "static-S768"):
        assert driver.run_row(driver.parse(["row", name, *sizes, *common])) == 0
    assert driver.write_demo_report(driver.parse(["report", "--work", str(tmp_path / "work")])) == 1, "rows are missing"
    (report,) = (tmp_path / "reports").iterdir()
    words = report.read_text()
    assert "| static-S768 | 768 |" in words
    assert "- default-1R4E2K against static-S768: routing " in words
    assert words.count("- factorllm-1R4E2K: lm ") == 1
