"""Option types that several commands share: one spelling, one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from factorctl.config import DEFAULT_WORKSPACE, Device, DTypeName
from factorctl.errors import UsageError

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
CheckpointArg = Annotated[
    Path | None, typer.Argument(metavar="[CKPT]", help="A checkpoint directory. [default: the newest in the workspace]")
]

DEFAULT_WORKSPACE_OPTION = DEFAULT_WORKSPACE


def key_values(pairs: list[str]) -> dict[str, str]:
    """`--option key=value`, repeated, as a mapping.

    Raises:
        UsageError: a pair without '=', or a key given twice.
    """
    result: dict[str, str] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise UsageError(f"--option {pair!r} is no KEY=VALUE", "for example --option by=activations")
        if key in result:
            raise UsageError(f"--option {key} is given twice")
        result[key] = value
    return result
