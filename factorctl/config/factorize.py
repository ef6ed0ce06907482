"""The options of `factorctl factorize`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, NamedTuple

from factorctl.config.common import CALIBRATION, MODEL, OVERWRITE, REVISION, TEXT_FIELD, CommonConfig
from factorctl.config.kinds import ANY_TEXT, TOKENS, Pairs
from factorctl.config.option import Option
from factorctl.config.shape import MAX_EXPERTS, MIN_EXPERTS, FactorShape, Gate, ScaleRule, factor_shape
from factorctl.errors import UsageError

RouterInit = Literal["analytic", "random"]


class Split(NamedTuple):
    """How an FFN is split, before its width is known."""

    num_experts: int
    top_k: int | None = None
    shared_fraction: float = 0.0
    scale: ScaleRule = "sum"


RECOMMENDED = Split(24, 8, 0.25, "fitted")
"""Half of the FFN active. No split of the demo model that was measured is both better and faster: docs/design.md."""


CALIBRATION_TOKENS: Mapping[str, int] = {"cuda": 65_536, "cpu": 16_384}
"""By type of device. Beyond 64K a split without refit gains nothing, one with it 2% for every doubling; a CPU can be
asked to wait for a quarter of that: docs/design.md."""


@dataclass(frozen=True)
class FactorizeConfig(CommonConfig):
    """`factorctl factorize`."""

    model: Annotated[str, MODEL]
    num_experts: Annotated[
        int | None,
        Option(
            f"Routed experts per layer, {MIN_EXPERTS} to {MAX_EXPERTS}. [default: {RECOMMENDED.num_experts}, "
            f"{RECOMMENDED.top_k} of them active, a quarter of the neurons shared, scale fitted: the best that was "
            "measured]",
            flag="--experts",
            short="-n",
            least=MIN_EXPERTS,
            most=MAX_EXPERTS,
        ),
    ] = None
    """None means `RECOMMENDED`, whatever of it is not given."""
    top_k: Annotated[int | None, Option("Experts active per token. [default: half of them]", short="-k")] = None
    shared_fraction: Annotated[
        float | None,
        Option(
            "Share of the neurons that is always on, the most important ones. [default: 0 with --experts]",
            least=0,
            below=1,
        ),
    ] = None
    strategy: Annotated[
        str | None,
        Option(
            "Partition strategy; see `factorctl plugins`. [default: routed; clustered with --router random, and where "
            "all experts or none are active]"
        ),
    ] = None
    strategy_options: Annotated[
        Mapping[str, str],
        Option(
            "KEY=VALUE for the strategy; may be repeated.",
            flag="--option",
            kind=Pairs(ANY_TEXT, "KEY=VALUE", "by=activations"),
        ),
    ] = field(default_factory=dict)
    router: Annotated[RouterInit, Option("analytic: fitted to calibration tokens; random: as in the paper.")] = (
        "analytic"
    )
    gate: Annotated[Gate, Option("softmax over the chosen experts (exports exactly), or the paper's hard 0/1.")] = (
        "softmax"
    )
    scale: Annotated[
        ScaleRule | None,
        Option(
            "Of the routed sum: 1, the paper's N/K, or fitted per layer, for one --top-k. [default: sum with --experts]"
        ),
    ] = None
    refit: Annotated[bool, Option("Refit the down-projections to the routing, in closed form; changes values.")] = False
    load_limit: Annotated[
        float | None,
        Option(
            "The most tokens that may choose one expert, in even shares (K/N of all): 1.5 for batches served by "
            "several GPUs. [default: none]",
            least=1,
            below=math.inf,
            hint="choose 1 (even) or more, for example 1.5",
        ),
    ] = None
    calibration: Annotated[str, CALIBRATION] = "self"
    calibration_tokens: Annotated[
        int | None,
        Option(
            "How many tokens to calibrate on (64K is 64,000). [default: {cpu:,}, {cuda:,} on a GPU]".format(
                **CALIBRATION_TOKENS
            ),
            kind=TOKENS,
            least=1,
            hint=f"try {CALIBRATION_TOKENS['cpu']}",
        ),
    ] = None
    text_field: Annotated[str | None, TEXT_FIELD] = None
    """Of the calibration text's rows."""
    revision: Annotated[str | None, REVISION] = None
    overwrite: Annotated[bool, OVERWRITE] = False

    def faults(self) -> Iterator[UsageError]:
        if self.load_limit is not None and self.router != "analytic":
            yield UsageError("--load-limit needs a fitted router", "leave --router random out")

    @property
    def split(self) -> Split:
        """The split that is meant, with nothing left open but `top_k`."""
        default = RECOMMENDED if self.num_experts is None else Split(self.num_experts)
        return Split(
            default.num_experts,
            default.top_k if self.top_k is None else self.top_k,
            default.shared_fraction if self.shared_fraction is None else self.shared_fraction,
            default.scale if self.scale is None else self.scale,
        )

    @property
    def calibrated_on(self) -> int:
        """Tokens, once `resolved`."""
        assert self.calibration_tokens is not None, "resolved"
        return self.calibration_tokens

    def resolved(self, device_type: str = "cpu") -> FactorizeConfig:
        """The same with its split, strategy and number of calibration tokens spelled out."""
        split = self.split
        routes = self.router == "analytic" and split.top_k not in (0, split.num_experts)
        return replace(
            self,
            **split._asdict(),
            strategy=self.strategy or ("routed" if routes else "clustered"),
            calibration_tokens=self.calibration_tokens or CALIBRATION_TOKENS[device_type],
        )

    def shape_for(self, intermediate_size: int) -> FactorShape:
        """The sizes that this gives an FFN of so many neurons.

        Raises:
            UsageError: see `factor_shape`.
        """
        num_experts, top_k, shared_fraction, _ = self.split
        return factor_shape(intermediate_size, num_experts=num_experts, top_k=top_k, shared_fraction=shared_fraction)
