"""What turns a dense model into a factored one, apart from its weights: the `factored` part of config.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from factorctl.config.shape import MAX_EXPERTS, FactorShape, Gate, ScaleRule
from factorctl.errors import IntegrityError, UsageError

MODEL_TYPE = "factorctl"
"""`model_type` of a native config.json: stock loaders refuse it rather than guess at the FFNs."""


@dataclass(frozen=True)
class DomainRouting:
    """Experts chosen once per domain of text, in place of a router's choice."""

    names: tuple[str, ...]
    """Of the domains, in the order of the stored tables."""
    top_k: int
    """Experts in every domain's row of them."""


@dataclass(frozen=True)
class FactoredSpec:
    """Sizes, gate and scale of every factored FFN of a model."""

    shape: FactorShape
    gate: Gate
    scale: ScaleRule
    fitted_a: tuple[float, ...] = ()
    """Per layer, with scale `fitted` only."""
    domains: DomainRouting | None = None
    """None where routers choose, token by token."""

    def scale_a(self, layer: int) -> float:
        """The layer's `a`: routed outputs are summed times a (gate hard) or averaged by the gate times a*K."""
        if self.scale == "sum" or not self.shape.routes:
            return 1.0
        if self.scale == "paper":
            return self.shape.num_experts / self.shape.top_k
        return self.fitted_a[layer]

    def with_top_k(self, top_k: int, scale: ScaleRule | None = None) -> FactoredSpec:
        """The same experts with another number of them active.

        Raises:
            UsageError: K does not fit, or the scale was fitted for another K.
        """
        n = self.shape.num_experts
        if not 0 <= top_k <= n:
            raise UsageError(f"--top-k {top_k} does not fit {n} experts", f"choose a number from 0 to {n}")
        if top_k == 0 and self.shape.shared_size == 0:
            raise UsageError(
                "--top-k 0 leaves no active neuron", "this checkpoint has no shared neurons: choose 1 or more"
            )
        if self.domains is not None and top_k not in (0, self.domains.top_k, n):
            raise UsageError(
                f"this checkpoint's experts were chosen by domain, {self.domains.top_k} for each, not {top_k}",
                f"choose --top-k {self.domains.top_k}, or train its parent with --routing domain --top-k {top_k}",
            )
        rule = scale or self.scale
        if rule == "fitted" and top_k not in (0, n):  # there, nothing is scaled
            if not self.fitted_a:
                raise UsageError("this checkpoint holds no fitted scales", "choose --scale sum or --scale paper")
            if top_k != self.shape.top_k:
                raise UsageError(
                    f"this checkpoint's scales were fitted for top-k {self.shape.top_k}, not {top_k}",
                    f"choose --scale sum or --scale paper, or factorize again with --top-k {top_k}",
                )
        return dataclasses.replace(self, shape=dataclasses.replace(self.shape, top_k=top_k), scale=rule)

    def to_json(self) -> dict[str, Any]:
        return {
            "num_experts": self.shape.num_experts,
            "top_k": self.shape.top_k,
            "expert_size": self.shape.expert_size,
            "shared_size": self.shape.shared_size,
            "gate": self.gate,
            "scale": self.scale,
            "fitted_a": list(self.fitted_a),
            **({} if self.domains is None else {"domains": _domains_to_json(self.domains)}),
        }

    def summary(self) -> dict[str, Any]:
        """The same with what readers would otherwise work out: a manifest's `factored`."""
        shape = self.shape
        return {**self.to_json(), "notation": shape.notation, "active_ffn_fraction": shape.active_ffn_fraction}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], *, num_layers: int, intermediate_size: int, origin: str) -> FactoredSpec:
        """Read and check; `origin` names the file in errors.

        Raises:
            IntegrityError: a field is missing, of the wrong type, or disagrees with the dense sizes.
        """
        try:
            shape = FactorShape(*(_count(raw, key) for key in ("num_experts", "top_k", "expert_size", "shared_size")))
            gate, scale, fitted = raw["gate"], raw["scale"], tuple(raw["fitted_a"])
            domains = _domains_from_json(raw["domains"], shape) if "domains" in raw else None
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"{origin}: the factored part is damaged: {error}") from None
        sizes_fit = shape.intermediate_size == intermediate_size and shape.top_k <= shape.num_experts <= MAX_EXPERTS
        choices_fit = gate in get_args(Gate) and scale in get_args(ScaleRule)
        scales_fit = all(isinstance(a, float) and math.isfinite(a) for a in fitted)
        if not (
            sizes_fit
            and choices_fit
            and scales_fit
            and len(fitted) in ({num_layers} if scale == "fitted" else {0, num_layers})
        ):
            raise IntegrityError(f"{origin}: the factored part does not fit its dense model")
        return cls(shape, gate, scale, tuple(float(a) for a in fitted), domains)


def _domains_to_json(domains: DomainRouting) -> dict[str, Any]:
    return {"names": list(domains.names), "top_k": domains.top_k}


def _domains_from_json(raw: Mapping[str, Any], shape: FactorShape) -> DomainRouting:
    names, top_k = raw["names"], _count(raw, "top_k")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError("the domains have no names")
    if not 0 < top_k < shape.num_experts:
        raise ValueError(f"domains choose {top_k} of {shape.num_experts} experts")
    return DomainRouting(tuple(names), top_k)


def _count(raw: Mapping[str, Any], key: str) -> int:
    value = raw[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise ValueError(f"{key} is {str(value)[:40]!r}")
    return value
