"""The verbs that write, one row each: how to run it, what it reads, what it replaces."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Row:
    """A verb with options that make it write all that it can write. In braces: what the bench fills in."""

    verb: str
    reads: str
    """Which artefact of the bench it reads: `source` or `base`."""
    options: tuple[object, ...]
    older: tuple[object, ...] | None
    """Options that make another result, which stands there already and is to be replaced; None where none can."""
    overwrite: tuple[str, ...] = ("--overwrite",)
    """What replacing takes."""
    places: tuple[str, ...] = ("--device", "cpu", "--out", "{out}", "--workspace", "{workspace}")
    go_on: tuple[str, ...] = ()
    """What goes on after a stop, where the same command alone refuses to."""
    repeats: bool = False
    """Whether the same command may be given again once the result is there."""
    needs: str | None = None
    """A package that may be missing."""


ROWS: dict[str, Row] = {
    "factorize": Row(
        "factorize",
        "source",
        ("{source}", "--experts", 4, "--strategy", "permuted", "--router", "random"),
        ("--seed", 1),
    ),
    "factorize, calibrated": Row(
        "factorize",
        "source",
        (
            *("{source}", "--experts", 4, "--strategy", "permuted", "--calibration", "{text}"),
            *("--calibration-tokens", 1024, "--shared-fraction", 0.25, "--scale", "fitted", "--refit"),
        ),
        ("--seed", 1),
    ),
    "finetune": Row(
        "finetune",
        "base",
        (
            *("{base}", "--data", "{text}", "--tokens", 256, "--block-length", 32, "--batch-tokens", 64),
            *("--micro-batch", 2, "--heldout-tokens", 64, "--save-every", 128),
        ),
        ("--seed", 1),
        go_on=("--resume",),
    ),
    "eval": Row(
        "eval",
        "base",
        (
            *("{base}", "--data", "{text}", "--data-tokens", 100, "--window", 32, "--tasks", "piqa", "--limit", 2),
            *("--task-data", "{tasks}", "--batch-size", 4, "--report", "{out}/eval.md", "--resume"),
        ),
        ("--seed", 1, "--stride", 8),
        overwrite=(),
        repeats=True,
    ),
    "profile": Row(
        "profile",
        "base",
        ("{base}", "--data", "random", "--batch", 1, "--prompt", 16, "--rounds", 3, "--decode-tokens", 1, "--tune"),
        ("--seed", 1),
        overwrite=(),
        places=(
            *("--device", "cpu", "--out", "{out}/profile.json", "--html", "{out}/report.html", "--plots", "{out}"),
            *("--workspace", "{workspace}"),
        ),
        repeats=True,
    ),
    "try": Row(
        "try",
        "base",
        ("{base}", "abc", "--max-new-tokens", 4),
        ("--seed", 1),
        overwrite=(),
        places=("--device", "cpu", "--out", "{out}/try.json", "--workspace", "{workspace}"),
        repeats=True,
    ),
    "frontier": Row(
        "frontier",
        "source",
        (
            *("{source}", "--experts", 2, "--calibration", "{text}", "--calibration-tokens", 512, "--data-tokens", 100),
            *("--prompt", 16, "--rounds", 3, "--speed-up", 0.5),
        ),
        ("--seed", 1),
        overwrite=(),
        repeats=True,
    ),
    "export hf": Row("export", "base", ("{base}", "--to", "hf"), ("--dtype", "bfloat16")),
    "export gguf": Row("export", "base", ("{base}", "--to", "gguf"), ("--quant", "q8_0")),
    "export dense": Row("export", "base", ("{base}", "--to", "dense"), ("--dtype", "bfloat16")),
    "export bnb-4bit": Row(
        "export", "base", ("{base}", "--to", "bnb-4bit"), ("--dtype", "bfloat16"), needs="bitsandbytes"
    ),
    "run": Row("run", "source", ("{recipe}",), (), overwrite=(), places=("--workspace", "{workspace}"), repeats=True),
    "demo": Row("demo", "source", (), None, places=("--workspace", "{workspace}"), repeats=True, needs="pydoc_data"),
}
"""Name -> row. A new verb that writes is one more row."""
HERE = [name for name, row in ROWS.items() if row.needs is None or importlib.util.find_spec(row.needs)]
"""The rows that can run here."""


def each_row(*, replacing: bool = False) -> pytest.MarkDecorator:
    """Parametrizes `name`; with `replacing` also `replaces`, for rows whose result can stand there already."""
    cases = [
        (name, replaces)
        for name in ROWS
        for replaces in ((False, True) if replacing else (False,))
        if not replaces or ROWS[name].older is not None
    ]
    return pytest.mark.parametrize(
        ("name", "replaces") if replacing else "name",
        [
            pytest.param(
                *((name, replaces) if replacing else (name,)),
                id=f"{name}{', replacing' if replaces else ''}",
                marks=pytest.mark.skipif(name not in HERE, reason=f"{ROWS[name].needs} is not installed"),
            )
            for name, replaces in cases
        ],
    )


RECIPE = """
name = {name}
seed = {seed}
device = "cpu"

[factorize]
model = {source}
experts = 4
strategy = "permuted"
router = "random"

[finetune]
tokens = 128
data = {text}
block-length = 32
batch-tokens = 64
micro-batch = 2
heldout-tokens = 64

[eval]
data = {text}
data-tokens = 100
window = 32

[profile]
latency = false
data = "random"
prompt = 16
batch = 1

[[export]]
to = "hf"
"""
