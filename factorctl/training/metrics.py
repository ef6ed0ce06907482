"""metrics.jsonl: one line per step, whole lines only, also after a kill."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from factorctl.files.publishing import writable, write_file

METRICS_NAME = "metrics.jsonl"


class MetricsFile:
    """Appends lines; `keep_until` forgets what a resumed run is about to do again."""

    def __init__(self, run: Path) -> None:
        self.path = run / METRICS_NAME

    def append(self, line: dict[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        with writable(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")

    def keep_until(self, step: int) -> None:
        """Drop the lines of later steps, and a last line that a kill cut short."""
        kept = [line for line in self.lines() if line.get("step", 0) <= step]
        write_file(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def lines(self) -> Iterator[dict[str, Any]]:
        """Every whole line."""
        if not self.path.exists():
            return
        for raw in self.path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(raw)
            except ValueError:
                return
            if isinstance(line, dict):
                yield line
