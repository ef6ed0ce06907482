"""The options of `factorctl factorize`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from factorctl.config.common import CommonConfig, require_positive
from factorctl.config.shape import FactorShape, Gate, ScaleRule, factor_shape
from factorctl.errors import UsageError

RouterInit = Literal["analytic", "random"]


class Split(NamedTuple):
    """How an FFN is split, before its width is known."""

    num_experts: int
    top_k: int | None = None
    shared_fraction: float = 0.0
    scale: ScaleRule = "sum"


RECOMMENDED = Split(8, 3, 0.25, "fitted")
"""About half of the FFN active. Of what changes no value, the best perplexity for its speed: docs/design.md has the
numbers. 32 experts are no better and slower on a CPU."""


CALIBRATION_TOKENS = 16_384
"""Held-out perplexity gains less than 1% beyond, and on a CPU every token is waited for: docs/design.md."""


@dataclass(frozen=True)
class FactorizeConfig(CommonConfig):
    """`factorctl factorize`."""

    model: str
    """Hub id, alias, local directory, .gguf file or pypi:PACKAGE==VERSION."""
    num_experts: int | None = None
    """None means `RECOMMENDED`, whatever of it is not given."""
    top_k: int | None = None
    """Routed experts active per token; None means half of them."""
    shared_fraction: float | None = None
    """None means none where `num_experts` is given."""
    strategy: str | None = None
    """None means `routed` where a router is fitted to text, else `clustered`."""
    strategy_options: Mapping[str, str] = field(default_factory=dict)
    router: RouterInit = "analytic"
    gate: Gate = "softmax"
    scale: ScaleRule | None = None
    """None means `sum` where `num_experts` is given."""
    refit: bool = False
    load_limit: float | None = None
    """The most calibration tokens that may choose one expert, in even shares (K/N of all)."""
    calibration: str = "self"
    calibration_tokens: int = CALIBRATION_TOKENS
    text_field: str | None = None
    """Of the calibration text's rows."""
    revision: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("--calibration-tokens", self.calibration_tokens, f"try {CALIBRATION_TOKENS}")
        if self.load_limit is not None and not 1 <= self.load_limit < float("inf"):
            raise UsageError(
                f"--load-limit {self.load_limit:g} is out of range", "choose 1 (even) or more, for example 1.5"
            )
        if self.load_limit is not None and self.router != "analytic":
            raise UsageError("--load-limit needs a fitted router", "leave --router random out")

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

    def resolved(self) -> FactorizeConfig:
        """The same with its split and strategy spelled out."""
        split = self.split
        routes = self.router == "analytic" and split.top_k not in (0, split.num_experts)
        return replace(self, **split._asdict(), strategy=self.strategy or ("routed" if routes else "clustered"))

    def shape_for(self, intermediate_size: int) -> FactorShape:
        """The sizes that this gives an FFN of so many neurons.

        Raises:
            UsageError: see `factor_shape`.
        """
        num_experts, top_k, shared_fraction, _ = self.split
        return factor_shape(intermediate_size, num_experts=num_experts, top_k=top_k, shared_fraction=shared_fraction)
