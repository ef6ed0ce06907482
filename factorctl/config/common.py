"""What every verb takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from factorctl.errors import UsageError

Device = Literal["auto", "cpu", "cuda"]
DTypeName = Literal["auto", "float32", "bfloat16", "float16"]

DEFAULT_WORKSPACE = Path("runs")


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """What every verb takes."""

    out: Path | None = None
    """Where the result goes; None means a name in the workspace, and for `profile` no file."""
    workspace: Path = DEFAULT_WORKSPACE
    seed: int = 0
    device: Device = "auto"
    dtype: DTypeName = "auto"
    """Storage dtype of what is made, compute dtype of what is measured; auto keeps the one that is stored, but measures
    in float32 where bfloat16 would only be emulated."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed {self.seed} is out of range", "choose a number from 0 to 4294967295")


def require_positive(option: str, number: int | None, hint: str | None = None) -> None:
    if number is not None and number < 1:
        raise UsageError(f"{option} {number} is no positive number", hint)
