"""What rounding the values does to the model: how far its answers move, and how much of that is routing.

Where two experts' logits are as near as the rounding, a token takes another expert, and a part of its FFN is another
one. A router that was never finetuned has many such decisions. So the model of the rounded values runs a second time
with every token's experts held to those of the unrounded one: what is left is what rounding does by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from factorctl.errors import FactorctlError
from factorctl.exporting.check.comparison import Agreement, Fidelity, compare
from factorctl.exporting.check.native import NativeRun, Question, native_run
from factorctl.exporting.check.near_ties import changed_choices
from factorctl.ffn.spec import FactoredSpec
from factorctl.models.families import DenseModel, ReadTensor

ACCEPTED_KL = {Fidelity.ROUNDED: 0.1, Fidelity.INT8: 0.1, Fidelity.INT4: 0.5}
"""Nats per token that rounding may cost by itself, every token keeping its experts, without being asked for. What near
ties add says more about the router than about the export: of the demo before finetuning, in q8_0, 0.86 nats to 0.02."""
NOTED_KL = 0.05
"""From here on it is said why."""


@dataclass(frozen=True)
class Rounding:
    """The native model of the export's values against that of the values before they were rounded."""

    kl: float
    """Mean KL(native || rounded) per token, in nats."""
    kl_same_experts: float
    """The same with every token's experts held to the native model's."""
    changed_choices: float
    """Share of routing decisions, one per token and layer, that choose other experts."""


class ExportDifferenceError(FactorctlError):
    """The export computes what its values say, but rounding moved it further than was accepted."""


def rounding_of(
    dense: DenseModel,
    spec: FactoredSpec,
    read: ReadTensor,
    question: Question,
    *,
    native: NativeRun,
    rounded: NativeRun,
    device: torch.device,
    by_sigmoids: bool = False,
) -> Rounding:
    """Compare two runs over `question`, the second of the values that `read` gives.

    Args:
        by_sigmoids: how the second run's gates were made; see `native_run`.
    """
    kl = compare(native.logits, rounded.logits).kl
    if not rounded.routing:
        return Rounding(kl, kl, 0.0)
    held = native_run(dense, spec, read, question, choices=native.routing, by_sigmoids=by_sigmoids, device=device)
    return Rounding(kl, compare(native.logits, held.logits).kl, changed_choices(native.routing, rounded.routing))


def require_accepted(
    agreement: Agreement, rounding: Rounding | None, fidelity: Fidelity, *, dtype: str, accepted: float | None
) -> list[str]:
    """Refuse an export whose answers part further from the native model's than they may; else what to note of it.

    Args:
        accepted: `--accept-difference`, up to which the KL may be, near ties included; None takes `ACCEPTED_KL`.

    Raises:
        ExportDifferenceError: saying how far, why, and what can be done.
    """
    if accepted is None:
        limit = ACCEPTED_KL.get(fidelity)
        found = None if rounding is None else rounding.kl_same_experts
    else:
        limit, found = accepted, agreement.kl
    if limit is not None and found is not None and found > limit:
        raise ExportDifferenceError(
            f"{dtype} moves this model by KL {agreement.kl:.2g} nats per token (top-1 agreement "
            f"{agreement.top1_agreement:.1%}); {found:.2g} is more than {limit:g}: {_reason(rounding, dtype)}",
            "nothing was published; finetune first, for trained routers decide by more; or keep more bits (--quant "
            "f16, --dtype float32); or publish it with this figure in its card: --accept-difference "
            f"{_rounded_up(agreement.kl)}",
        )
    if rounding is None or agreement.kl < NOTED_KL:
        return []
    return [f"KL {agreement.kl:.2g} nats to the native model: {_reason(rounding, dtype)}; finetuning makes it less"]


def _reason(rounding: Rounding | None, dtype: str) -> str:
    if rounding is None or not rounding.changed_choices:
        return f"rounding to {dtype}"
    return (
        f"rounding to {dtype} turns {rounding.changed_choices:.2%} of the routing decisions, near ties, to other "
        f"experts; with the same experts the KL would be {rounding.kl_same_experts:.2g}"
    )


def _rounded_up(kl: float) -> str:
    """Two digits, not below `kl`."""
    return f"{kl * 1.05:.2g}"
