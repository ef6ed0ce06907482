"""The options of `factorctl profile`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from factorctl.config.common import CHECKPOINT, TEXT_FIELD, TOP_K, CommonConfig
from factorctl.config.kinds import WHOLE, Listed
from factorctl.config.option import Option
from factorctl.config.shape import ScaleRule

WHOLES = Listed(WHOLE, "whole numbers", "1,8,32")


@dataclass(frozen=True)
class ProfileConfig(CommonConfig):
    """`factorctl profile`."""

    checkpoint: Annotated[Path | None, CHECKPOINT] = None
    batch: Annotated[
        tuple[int, ...], Option("Sequences at once; a list.", kind=WHOLES, least=1, hint="for example --batch 1,8")
    ] = (1, 8)
    prompt: Annotated[
        tuple[int, ...],
        Option(
            "Tokens per sequence before decoding; a list.", kind=WHOLES, least=1, hint="for example --prompt 128,512"
        ),
    ] = (128, 512)
    decode_tokens: Annotated[int, Option("Decoding steps per round.", least=1, hint="try 8")] = 8
    """Each one a sample."""
    rounds: Annotated[int, Option("Interleaved rounds per regime, after one to warm up.", least=1, hint="try 10")] = 10
    seconds: Annotated[float, Option("Begin no further round of a regime after this long.")] = 60.0
    """Three are run in any case."""
    top_k: Annotated[int | None, TOP_K] = None
    scale: Annotated[ScaleRule | None, Option("Needed with --top-k where scales were fitted.")] = None
    data: Annotated[str, Option("Text that decides the routing: files, Hub dataset, self, or random tokens.")] = "self"
    text_field: Annotated[str | None, TEXT_FIELD] = None
    latency: Annotated[bool, Option("Time it, or only count.")] = True
    sweep_k: Annotated[bool, Option("Also count FLOPs at every number of experts.")] = False
    tune: Annotated[bool, Option("Time the execution paths first and remember the fastest for this machine.")] = False
    require_quiet: Annotated[bool, Option("Refuse a busy machine instead of marking the report.", role="how")] = False
    html: Annotated[Path | None, Option("Write one self-contained page here.", role="place")] = None
    plots: Annotated[Path | None, Option("Write the plots as PNG into this directory.", role="place")] = None
    out: Annotated[Path | None, Option("Write the JSON report with all samples here.", short="-o", role="place")] = None
    """None means no file."""
