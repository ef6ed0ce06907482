"""How near two sets of logits are, and how near an export has to be to be published.

Q sequences of L tokens, V vocabulary. A routing tie, two experts whose logits differ by less than rounding, sends a
token to another expert and changes the rest of its sequence. That is chance, not a fault, and a fault changes all of
them: so a quarter of the sequences may exceed the limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from factorctl.errors import FactorctlError

TIED_SHARE = 0.25


class Fidelity(StrEnum):
    """What was done to the values, which decides how far logits may move."""

    EXACT = "exact"
    """Nothing, or multiplied by powers of two."""
    ROUNDED = "rounded"
    """Rounded to 16 bits, multiplied by another number, or routed by a hard gate's stand-in."""
    INT8 = "8 bits"
    INT4 = "4 bits"


RELATIVE_LIMITS = {Fidelity.EXACT: 2e-3, Fidelity.ROUNDED: 0.3, Fidelity.INT8: 0.4, Fidelity.INT4: 0.8}
"""Largest rms logit error of a sequence, relative to the spread (std) of its logits. Unrelated logits give 1.4."""


@dataclass(frozen=True)
class Agreement:
    """The comparison of an export's logits with the native model's."""

    tokens: int
    max_logit_error: float
    """Largest absolute difference of any logit of any token."""
    relative_error: float
    """Median over the sequences of rms(difference) / std(native logits)."""
    top1_agreement: float
    """Share of tokens with the same most likely successor."""
    kl: float
    """Mean KL(native || export) per token, in nats."""
    agreeing_sequences: float
    """Share of the sequences within the limit."""


class ExportMismatchError(FactorctlError):
    """The export computes something else than the native model: nothing may be published."""


def compare(native: Sequence[torch.Tensor], export: Sequence[torch.Tensor], fidelity: Fidelity) -> Agreement:
    """Compare logits, each [L, V], sequence by sequence.

    Raises:
        ExportMismatchError: too many sequences differ by more than `fidelity` allows, with the numbers.
    """
    errors_Q = [relative_error(ours, theirs) for ours, theirs in zip(native, export, strict=True)]
    limit = RELATIVE_LIMITS[fidelity]
    agreeing = sum(error <= limit for error in errors_Q) / len(errors_Q)
    tokens = sum(len(logits) for logits in native)
    pairs = list(zip(native, export, strict=True))
    result = Agreement(
        tokens=tokens,
        max_logit_error=max(float((ours - theirs).abs().max()) for ours, theirs in pairs),
        relative_error=sorted(errors_Q)[len(errors_Q) // 2],
        top1_agreement=sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs) / tokens,
        kl=sum(float(kl_divergence(ours, theirs).sum()) for ours, theirs in pairs) / tokens,
        agreeing_sequences=agreeing,
    )
    if agreeing < 1 - TIED_SHARE:
        raise ExportMismatchError(
            f"the export does not compute what the native model computes: {1 - agreeing:.0%} of the sequences differ "
            f"by more than {limit:g} of the logits' spread ({fidelity}); largest logit error "
            f"{result.max_logit_error:.3g}, top-1 agreement {result.top1_agreement:.1%}, KL {result.kl:.3g}",
            "nothing was published",
        )
    return result


def relative_error(native_LV: torch.Tensor, export_LV: torch.Tensor) -> float:
    """rms(difference) / std(native); NaN in either counts as infinite."""
    error = float((native_LV - export_LV).square().mean().sqrt() / native_LV.std().clamp_min(1e-30))
    return error if error == error else float("inf")


def kl_divergence(native_LV: torch.Tensor, export_LV: torch.Tensor) -> torch.Tensor:
    """KL(native || export) per token [L], in nats."""
    p_LV, q_LV = native_LV.log_softmax(-1), export_LV.log_softmax(-1)
    return (p_LV.exp() * (p_LV - q_LV)).sum(-1).clamp_min(0)
