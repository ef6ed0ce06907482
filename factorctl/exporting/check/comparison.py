"""How near an export's logits are to the native model's, and how near they have to be for it to be published.

An export is proven in two runs over the same text. With *every expert on* nothing is decided, so nothing can fall the
other way: all tokens are judged, and every weight of every expert takes part. As it is *served*, K experts work for a
token, and tokens are judged up to the first routing decision of their sequence that is nearer to a tie than the
engine's rounding (`near_ties`). Both are held against a native model of the export's own values, rounding included;
so the limits are those of arithmetic and do not grow with the rounding. What rounding does to the model is stated as
`Agreement`, against the values before it.

Q sequences of L tokens, V vocabulary, N num_experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from factorctl.errors import FactorctlError

COMPARED_CANDIDATES = 8
"""Where an engine gives log-probabilities of its likeliest tokens only: how many enter the largest difference."""
FLOAT64_LIMIT = 5e-4
"""Largest rms error of a sequence's logits, relative to their spread, and of a router's logits, relative to their rms,
where both sides compute in float64. 30 layers with massive activations come to 2e-5, for norms and softmaxes are
float32 all the same; a router row that is off by a hundredth has an error of 1e-2."""


class Fidelity(StrEnum):
    """What was done to the values, which decides how far the model may have moved."""

    EXACT = "exact"
    """Nothing, or multiplied by powers of two."""
    ROUNDED = "rounded"
    """Rounded to 16 bits, multiplied by another number, or routed by a hard gate's stand-in."""
    INT8 = "8 bits"
    INT4 = "4 bits"
    STEPS = "every weight within a quantisation step"
    """Checked weight by weight, `check.bnb_proof`; logits are stated and need only be finite."""


@dataclass(frozen=True)
class Agreement:
    """How far an export's answers are from the native model's, as it is served."""

    tokens: int
    max_logit_error: float
    """Largest absolute difference; of log-probabilities where the engine gives no logits."""
    relative_error: float
    """Median over the sequences of rms(difference) / std(native logits)."""
    top1_agreement: float
    """Share of tokens with the same most likely successor."""
    kl: float
    """Mean KL(native || export) per token, in nats."""


@dataclass(frozen=True)
class Proof:
    """What was shown to be equal, to the engine's rounding, with the values that the export holds."""

    all_experts_error: float | None
    """Largest rms error of a sequence's logits relative to their spread, every expert on; None without routing."""
    served_error: float | None
    """The same as it is served, over `judged_tokens`; None where there are none."""
    judged_tokens: int
    """Before the first routing decision of their sequence that is nearer to a tie than the engine's rounding."""
    tokens: int
    near_ties: float
    """Share of all routing decisions that are."""


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

    def __init__(self, found: str) -> None:
        super().__init__(
            f"the export does not compute what the native model computes: {found}", "nothing was published"
        )


Candidates = Sequence[Sequence[tuple[int, float]]]
"""Per position (id, log-probability) of the likeliest next tokens: what an engine gives that keeps its logits."""
Answers = Sequence[torch.Tensor | Candidates]
"""Per sequence logits [L, V], or candidates."""


def compare(native: Sequence[torch.Tensor], export: Answers) -> Agreement:
    """Compare all tokens of all sequences."""
    errors = [_error(ours, theirs) for ours, theirs in zip(native, export, strict=True)]
    tokens = sum(error.tokens for error in errors)
    return Agreement(
        tokens=tokens,
        max_logit_error=max(error.largest for error in errors),
        relative_error=sorted(error.relative for error in errors)[len(errors) // 2],
        top1_agreement=sum(error.same_top1 for error in errors) / tokens,
        kl=sum(error.kl_sum for error in errors) / tokens,
    )


def largest_error(native: Sequence[torch.Tensor], export: Answers, sound: Sequence[int] | None = None) -> float | None:
    """Largest rms error of a sequence relative to its spread, over its first `sound` tokens; None where all are 0."""
    lengths = sound or [len(ours) for ours in native]
    pairs = zip(native, export, lengths, strict=True)
    return max((_error(ours[:n], theirs[:n]).relative for ours, theirs, n in pairs if n), default=None)


def require_near(error: float | None, limit: float, run: str) -> None:
    """Hold one run's `largest_error` against what rounding explains.

    Raises:
        ExportMismatchError: the error exceeds `limit`, or is no number.
    """
    if error is not None and not error <= limit:
        raise ExportMismatchError(
            f"{run}, logits differ by {error:.2g} of their spread, and rounding explains {limit:g}"
        )


def require_same_routers(native: Sequence[torch.Tensor], export: Sequence[torch.Tensor], limit: float) -> None:
    """Compare router logits, per layer [T, N], expert by expert.

    Raises:
        ExportMismatchError: naming the first layer and expert that differ.
    """
    for layer, (ours_TN, theirs_TN) in enumerate(zip(native, export, strict=True)):
        size_N = ours_TN.square().mean(0).sqrt().clamp_min(1e-30)
        error_N = (theirs_TN - ours_TN).square().mean(0).sqrt() / size_N
        for expert in (~(error_N <= limit)).nonzero().flatten().tolist():
            raise ExportMismatchError(
                f"router logits of expert {expert} in layer {layer} differ by {float(error_N[expert]):.2g} of their "
                f"size, and rounding explains {limit:g}"
            )


def _error(ours: torch.Tensor, theirs: torch.Tensor | Candidates) -> SequenceError:
    return _of_logits(ours, theirs) if isinstance(theirs, torch.Tensor) else _of_candidates(ours, theirs)


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
