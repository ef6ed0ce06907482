"""What every benchmark report says of where and how it was made."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from factorctl.processor import processor_name

LIBRARIES = ("factorctl", "torch", "transformers", "numpy")


def slug(words: str) -> str:
    """Words as part of a file name: 'AMD EPYC' gives 'amd-epyc'."""
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def report_path(topic: str) -> Path:
    """docs/benchmarks/<date>-<topic>-<cpu>.md."""
    name = f"{datetime.date.today().isoformat()}-{topic}-{slug(processor_name())}.md"
    return Path(__file__).parents[2] / "docs" / "benchmarks" / name


def header(title: str, *, libraries: Sequence[str] = LIBRARIES) -> str:
    """Title, date, hardware, load, versions and the command that reproduces the report."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    command = shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    return f"""# {title}

{datetime.date.today().isoformat()}, {processor_name()}, {os.cpu_count()} cores, load average at the end {load}.
Python {platform.python_version()}, {versions}.

    {command}
"""


def timed(call: Callable[..., Any], step: str, spent: dict[str, list[float]]) -> Callable[..., Any]:
    """`call`, whose seconds are added to those of `step` each time."""

    def wrapped(*args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return call(*args, **options)
        finally:
            spent.setdefault(step, []).append(time.perf_counter() - started)

    return wrapped


def write_report(path: Path, text: str) -> None:
    """Print the report and write it."""
    print(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"written to {path}", file=sys.stderr)
