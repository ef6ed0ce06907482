"""Types of options that several commands share: one spelling, one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from factorctl.config.common import Device, DTypeName

OutputFormat = Literal["text", "json"]

FormatOpt = Annotated[OutputFormat, typer.Option("--format", help="What stdout gets: tables, or one JSON object.")]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no remarks on stderr.")]
OutOpt = Annotated[Path | None, typer.Option("--out", "-o", help="Where the result goes. [default: in the workspace]")]
WorkspaceOpt = Annotated[Path, typer.Option("--workspace", help="Directory of unnamed results.")]
SeedOpt = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
DeviceOpt = Annotated[Device, typer.Option("--device", help="Where to compute.")]
DTypeOpt = Annotated[DTypeName, typer.Option("--dtype", help="auto keeps the source's dtype.")]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="Replace the output once the new one is whole.")]
DryRunOpt = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")]
TextFieldOpt = Annotated[
    str | None,
    typer.Option("--text-field", help="Field of JSON and parquet rows that holds the text, as `text` or `doc.body`."),
]
TopKOpt = Annotated[
    int | None, typer.Option("--top-k", "-k", help="Experts active per token. [default: the checkpoint's]")
]
CheckpointArg = Annotated[
    Path | None, typer.Argument(metavar="[CKPT]", help="A checkpoint directory. [default: the newest in the workspace]")
]
