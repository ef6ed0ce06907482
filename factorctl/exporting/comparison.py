"""How near two sets of logits are, and how near an export has to be to be published.

Q sequences of L tokens, V vocabulary. A routing tie, two experts whose logits differ by less than rounding, sends a
token to another expert and changes the rest of its sequence. That is chance, not a fault, and a fault changes all of
them: so a quarter of the sequences may exceed the limit.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from factorctl.errors import FactorctlError

TIED_SHARE = 0.25
COMPARED_CANDIDATES = 8
"""Where an engine gives log-probabilities of its likeliest tokens only: how many enter the largest difference."""


class Fidelity(StrEnum):
    """What was done to the values, which decides how far logits may move."""

    EXACT = "exact"
    """Nothing, or multiplied by powers of two."""
    ROUNDED = "rounded"
    """Rounded to 16 bits, multiplied by another number, or routed by a hard gate's stand-in."""
    INT8 = "8 bits"
    INT4 = "4 bits"
    STEPS = "every weight within a quantisation step"
    """Checked weight by weight, `quantised_check`; logits are stated and need only be finite."""


RELATIVE_LIMITS = {
    Fidelity.EXACT: 2e-3,
    Fidelity.ROUNDED: 0.3,
    Fidelity.INT8: 0.4,
    Fidelity.INT4: 0.8,
    Fidelity.STEPS: sys.float_info.max,
}
"""Largest rms logit error of a sequence, relative to the spread (std) of its logits. Unrelated logits give 1.4."""


@dataclass(frozen=True)
class Agreement:
    """The comparison of an export's logits with the native model's."""

    tokens: int
    max_logit_error: float
    """Largest absolute difference; of log-probabilities where the engine gives no logits."""
    relative_error: float
    """Median over the sequences of rms(difference) / std(native logits)."""
    top1_agreement: float
    """Share of tokens with the same most likely successor."""
    kl: float
    """Mean KL(native || export) per token, in nats."""
    agreeing_sequences: float
    """Share of the sequences within the limit."""


@dataclass(frozen=True)
class SequenceError:
    """One sequence of the comparison; sums over its tokens."""

    tokens: int
    largest: float
    relative: float
    same_top1: int
    kl_sum: float


class ExportMismatchError(FactorctlError):
    """The export computes something else than the native model: nothing may be published."""


def compare(native: Sequence[torch.Tensor], export: Sequence[torch.Tensor], fidelity: Fidelity) -> Agreement:
    """Compare logits, each [L, V], sequence by sequence.

    Raises:
        ExportMismatchError: too many sequences differ by more than `fidelity` allows, with the numbers.
    """
    return judged([_of_logits(ours, theirs) for ours, theirs in zip(native, export, strict=True)], fidelity)


def compare_candidates(
    native: Sequence[torch.Tensor], candidates: Sequence[Sequence[Sequence[tuple[int, float]]]], fidelity: Fidelity
) -> Agreement:
    """As `compare`, against an engine that gives (id, log-probability) of its likeliest tokens at every position.

    The KL counts all other tokens as one.

    Raises:
        ExportMismatchError: too many sequences differ by more than `fidelity` allows, with the numbers.
    """
    return judged([_of_candidates(ours, theirs) for ours, theirs in zip(native, candidates, strict=True)], fidelity)


def judged(errors: Sequence[SequenceError], fidelity: Fidelity) -> Agreement:
    """The sequences as one result, if enough of them are within the limit of `fidelity`."""
    limit, tokens = RELATIVE_LIMITS[fidelity], sum(error.tokens for error in errors)
    result = Agreement(
        tokens=tokens,
        max_logit_error=max(error.largest for error in errors),
        relative_error=sorted(error.relative for error in errors)[len(errors) // 2],
        top1_agreement=sum(error.same_top1 for error in errors) / tokens,
        kl=sum(error.kl_sum for error in errors) / tokens,
        agreeing_sequences=sum(error.relative <= limit for error in errors) / len(errors),
    )
    if result.agreeing_sequences < 1 - TIED_SHARE:
        raise ExportMismatchError(
            f"the export does not compute what the native model computes: {1 - result.agreeing_sequences:.0%} of the "
            f"sequences differ by more than {limit:g} of the logits' spread ({fidelity}); largest logit error "
            f"{result.max_logit_error:.3g}, top-1 agreement {result.top1_agreement:.1%}, KL {result.kl:.3g}",
            "nothing was published",
        )
    return result


def _of_logits(native_LV: torch.Tensor, export_LV: torch.Tensor) -> SequenceError:
    difference_LV = native_LV - export_LV
    return SequenceError(
        tokens=len(native_LV),
        largest=_finite(difference_LV.abs().max()),
        relative=_finite(difference_LV.square().mean().sqrt() / native_LV.std().clamp_min(1e-30)),
        same_top1=int((native_LV.argmax(-1) == export_LV.argmax(-1)).sum()),
        kl_sum=_finite(kl_divergence(native_LV, export_LV).sum()),
    )


def _of_candidates(native_LV: torch.Tensor, candidates: Sequence[Sequence[tuple[int, float]]]) -> SequenceError:
    ids_LC = torch.tensor([[token for token, _ in step] for step in candidates])
    theirs_LC = torch.tensor([[logprob for _, logprob in step] for step in candidates])
    ours_LC = native_LV.log_softmax(-1).gather(1, ids_LC)
    difference_LC = ours_LC - theirs_LC
    return SequenceError(
        tokens=len(native_LV),
        largest=_finite(difference_LC[:, :COMPARED_CANDIDATES].abs().max()),
        relative=_finite(difference_LC.square().mean().sqrt() / native_LV.std().clamp_min(1e-30)),
        same_top1=int((native_LV.argmax(-1) == ids_LC[:, 0]).sum()),
        kl_sum=_finite(_coarse_kl(ours_LC, theirs_LC).sum()),
    )


def _coarse_kl(ours_LC: torch.Tensor, theirs_LC: torch.Tensor) -> torch.Tensor:
    """KL per token [L] between distributions known on C candidates, the rest taken together."""
    known = (ours_LC.exp() * (ours_LC - theirs_LC)).sum(-1)
    rest, their_rest = ((1 - logs.exp().sum(-1)).clamp_min(1e-9) for logs in (ours_LC.double(), theirs_LC.double()))
    return (known + rest * (rest / their_rest).log()).clamp_min(0)


def _finite(value: torch.Tensor) -> float:
    """NaN counts as infinitely wrong."""
    number = float(value)
    return number if number == number else float("inf")


def kl_divergence(native_LV: torch.Tensor, export_LV: torch.Tensor) -> torch.Tensor:
    """KL(native || export) per token [L], in nats."""
    p_LV, q_LV = native_LV.double().log_softmax(-1), export_LV.double().log_softmax(-1)
    return (p_LV.exp() * (p_LV - q_LV)).sum(-1).clamp_min(0)
