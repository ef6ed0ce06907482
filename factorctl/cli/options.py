"""Options that are no part of a config: those of commands that have none, and what every command line may ask."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from factorctl.config.common import CHECKPOINT

OutputFormat = Literal["text", "json"]

FormatOpt = Annotated[OutputFormat, typer.Option("--format", help="What stdout gets: tables, or one JSON object.")]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no remarks on stderr.")]
DryRunOpt = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")]
WorkspaceOpt = Annotated[Path, typer.Option("--workspace", help="Directory of unnamed results.")]
CheckpointArg = Annotated[Path | None, typer.Argument(metavar=CHECKPOINT.metavar, help=CHECKPOINT.help)]
