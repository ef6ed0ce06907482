"""Recipes run side by side, each as a user would run it, and the paper's table out of what they measured.

    python tests/benchmarks/gpu_recipes.py docs/paper-table docs/unseen-domains --home /dev/shm/factorctl \
      --set tokens=500000 --set limit=300 --seconds 500

The home directory holds `text` and `bench`; logs and results go to `recipes` in it, where a second call goes on if a
first one was cut short. Every recipe begins at once: on a GPU one of these models alone waits for its own launches.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PAPER_TABLE = "paper-table"
"""Recipes of this folder are the rows of one table."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="of recipes")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="changes", help="KEY=VALUE for every recipe's KEY")
    parser.add_argument("--only", default="", help="names of recipes, as folder/name,folder/name")
    parser.add_argument("--seconds", type=float, help="interrupt what still runs after this long")
    arguments = parser.parse_args()
    work = furnished(arguments.home)
    recipes = [file for folder in arguments.folders for file in sorted(folder.glob("*.toml"))]
    chosen = set(filter(None, arguments.only.split(",")))
    recipes = [file for file in recipes if not chosen or f"{file.parent.name}/{file.stem}" in chosen]
    running = {name(file): begun(file, arguments.changes, work) for file in recipes}
    deadline = None if arguments.seconds is None else time.monotonic() + arguments.seconds
    codes = {recipe: ended(process, deadline) for recipe, process in running.items()}
    for recipe, code in codes.items():
        print(f"{recipe}: {'done' if code == 0 else f'ended with {code}'}", flush=True)
    rows = [str(report) for report in sorted(work.glob(f"runs/{PAPER_TABLE}-*/eval/results.json"))]  # what is finished
    if rows:
        words = [word for row in rows for word in ("--paper-table", row)]
        codes["table"] = factorctl(["eval", *words, "--report", "paper-table.md"], work, work / "table.log").wait()
    return 1 if any(codes.values()) else 0


def name(recipe: Path) -> str:
    return f"{recipe.parent.name}-{recipe.stem}"


def furnished(home: Path) -> Path:
    """A directory in which the recipes' names of data mean something."""
    work = home / "recipes"
    work.mkdir(parents=True, exist_ok=True)
    for there in [*(home / "text").iterdir(), home / "bench"]:
        if not (link := work / there.name).exists():
            link.symlink_to(there.resolve())
    return work


def begun(recipe: Path, changes: Sequence[str], work: Path) -> subprocess.Popen[bytes]:
    text = recipe.read_text(encoding="utf-8")
    for key, value in (change.split("=", 1) for change in changes):
        text = re.sub(rf"^{re.escape(key)} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
    mine = work / f"{name(recipe)}.toml"
    mine.write_text(text, encoding="utf-8")
    return factorctl(["run", mine.name], work, mine.with_suffix(".log"))


def ended(process: subprocess.Popen[bytes], deadline: float | None) -> int:
    """Its exit code; what is interrupted saves its state."""
    try:
        return process.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        return process.wait()


def factorctl(words: Sequence[str], work: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "factorctl", *words],
            cwd=work,
            env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "COLUMNS": "160"},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )


if __name__ == "__main__":
    sys.exit(main())
