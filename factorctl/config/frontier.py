"""The options of `factorctl frontier`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from factorctl.config.common import CALIBRATION, MODEL, REVISION, TEXT_FIELD, CommonConfig
from factorctl.config.factorize import RECOMMENDED
from factorctl.config.kinds import NUMBER, TIME, TOKENS, WHOLE, Listed
from factorctl.config.option import Option
from factorctl.config.shape import MAX_EXPERTS, MIN_EXPERTS

Phase = Literal["prefill", "decode"]
Kept = Literal["accuracy", "perplexity"]
SEARCH_CALIBRATION_TOKENS = 4096
"""A quarter of what one `factorize` takes: a search pays for every token as many times as it tries splits."""
NO_SHARE = "choose a share above 0, at most 1"


@dataclass(frozen=True)
class FrontierConfig(CommonConfig):
    """`factorctl frontier`."""

    model: Annotated[str, MODEL]
    speed_up: Annotated[
        float | None,
        Option(
            "Budget: at least so many times as fast as the dense model, measured here.",
            least=1e-3,
            below=math.inf,
            hint="choose for example 1.3",
        ),
    ] = None
    phase: Annotated[Phase, Option("What --speed-up means, and the picture shows.")] = "decode"
    active: Annotated[
        float | None,
        Option("Budget: at most this share of the FFN works for a token.", least=1e-6, most=1, hint=NO_SHARE),
    ] = None
    keep: Annotated[
        float | None,
        Option("Budget: at least this share of the dense model's quality is kept.", least=1e-6, most=1, hint=NO_SHARE),
    ] = None
    keep_by: Annotated[
        Kept, Option("What --keep is a share of: next-token accuracy, or dense perplexity over the split's.")
    ] = "accuracy"
    experts: Annotated[
        tuple[int, ...],
        Option(
            "Numbers of experts to try; a list.",
            short="-n",
            kind=Listed(WHOLE, "whole numbers", "8,32"),
            least=MIN_EXPERTS,
            most=MAX_EXPERTS,
        ),
    ] = (8,)
    """Few, which K sweeps in few steps. Each with each of `shared_fraction` is one partition, over which K is swept."""
    shared_fraction: Annotated[
        tuple[float, ...],
        Option(
            "Shares of the neurons that are always on, to try; a list.",
            kind=Listed(NUMBER, "numbers", "0.125,0.25"),
            least=0,
            below=1,
        ),
    ] = (RECOMMENDED.shared_fraction,)
    strategy: Annotated[str, Option("Partition strategy of routed splits; see `factorctl plugins`.")] = "routed"
    refit: Annotated[bool, Option("Refit the down-projections of every split, as factorize can.")] = True
    calibration: Annotated[str, CALIBRATION] = "self"
    calibration_tokens: Annotated[
        int,
        Option(
            "How many tokens to calibrate every split on.",
            kind=TOKENS,
            least=1,
            hint=f"try {SEARCH_CALIBRATION_TOKENS}",
        ),
    ] = SEARCH_CALIBRATION_TOKENS
    data: Annotated[
        str | None,
        Option("Held-out text. [default: documents of the calibration text that calibration did not come to]"),
    ] = None
    data_tokens: Annotated[int, Option("How many held-out tokens to judge on.", kind=TOKENS, least=1)] = 4096
    text_field: Annotated[str | None, TEXT_FIELD] = None
    revision: Annotated[str | None, REVISION] = None
    batch: Annotated[int, Option("Sequences at once where speed is measured.", least=1)] = 1
    prompt: Annotated[int, Option("Tokens of each before decoding.", least=1)] = 512
    rounds: Annotated[
        int, Option("Interleaved rounds of timing per split; the chosen one gets twice as many.", least=1)
    ] = 5
    time: Annotated[
        float | None,
        Option("Begin no split that would end later: 90s, 10m. [default: try all]", kind=TIME, role="how"),
    ] = None
    """Seconds."""

    @property
    def has_budget(self) -> bool:
        return any(budget is not None for budget in (self.speed_up, self.active, self.keep))
