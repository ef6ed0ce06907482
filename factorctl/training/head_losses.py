"""Losses on the vocabulary, computed a chunk of tokens at a time.

With V = 49,152, the float32 logits of 2048 tokens are 400 MB, and teacher, student and their gradients would take six
times that. The head is frozen, so the only gradient wanted is that of the hidden states [T, D]: each chunk's is taken
while its logits are at hand, and they are dropped. That costs no arithmetic; recomputing them later would. And what is
done value by value on [T, V] takes as long as the head's products if it is left to autograd: where a gradient is
wanted, losses and gradient come from the two log-softmaxes at once.

T tokens, D hidden_size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from factorctl.training.losses import IGNORED, kd_loss, lm_loss, wide
from factorctl.training.presets import LossWeights

CHUNK_TOKENS = 512
CHUNK_BYTES_CPU = 24 << 20
"""Float32 logits of one chunk on a CPU. glibc hands buffers over 32 MB back to the kernel whenever they are freed, and
touching their pages anew took a quarter of the demo model's training time."""
Head = Callable[[torch.Tensor], torch.Tensor]
"""Final hidden states [T, D] -> logits [T, V]."""


def chunk_tokens(device: torch.device, vocab_size: int) -> int:
    """How many tokens' logits are held at once."""
    if device.type != "cpu":
        return CHUNK_TOKENS
    return max(1, min(CHUNK_TOKENS, CHUNK_BYTES_CPU // (4 * vocab_size)))


class HeadLosses(NamedTuple):
    """The weighted sum, which carries the gradient, and its parts, which do not."""

    total: torch.Tensor
    lm: torch.Tensor
    kd: torch.Tensor | None
    teacher_lm: torch.Tensor | None
    """The teacher's own loss; measured only where no gradient is wanted."""


@dataclass(frozen=True)
class HeadTask:
    """What to compute from one batch's hidden states."""

    head: Head
    targets_T: torch.Tensor
    teacher_TD: torch.Tensor | None
    weights: LossWeights
    temperature: float
    chunk_tokens: int = CHUNK_TOKENS

    @torch.no_grad()
    def measured(self, student_CD: torch.Tensor, start: int, *, measuring: bool) -> torch.Tensor:
        """A chunk's share of [lm, kd, teacher's lm], each a mean over all tokens of the batch."""
        stop = start + student_CD.shape[0]
        targets_C, counted = self.targets_T[start:stop], self._counted()
        logits_CV = self.head(student_CD)
        lm = lm_loss(logits_CV, targets_C, reduction="sum") / counted
        kd = teacher_lm = torch.zeros_like(lm)
        if self.teacher_TD is not None and (self.weights.kd or measuring):
            teacher_CV = self.head(self.teacher_TD[start:stop])
            kd = kd_loss(logits_CV, teacher_CV, self.temperature) * (stop - start) / self.targets_T.shape[0]
            if measuring:
                teacher_lm = lm_loss(teacher_CV, targets_C, reduction="sum") / counted
        return torch.stack([lm, kd, teacher_lm])

    def learned(self, student_CD: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same parts, and the gradient of their weighted sum, [C, D]."""
        stop = start + student_CD.shape[0]
        student_CD = student_CD.detach().requires_grad_()
        with torch.enable_grad():
            logits_CV = self.head(student_CD)
        distils = self.teacher_TD is not None and bool(self.weights.kd)
        with torch.no_grad():
            teacher_CV = self.head(self.teacher_TD[start:stop]) if distils and self.teacher_TD is not None else None
            per_lm, per_kd = 1 / self._counted().double(), 1 / self.targets_T.shape[0]
            found = losses_and_gradient(
                logits_CV.detach(),
                teacher_CV,
                self.targets_T[start:stop],
                lm_weight=self.weights.lm * per_lm if self.weights.lm else None,
                kd_weight=self.weights.kd * per_kd,
                temperature=self.temperature,
            )
        (gradient_CD,) = torch.autograd.grad(logits_CV, student_CD, found.gradient_CV.to(logits_CV.dtype))
        return torch.stack([found.lm * per_lm, found.kd * per_kd, torch.zeros_like(found.kd)]), gradient_CD

    def _counted(self) -> torch.Tensor:
        return (self.targets_T != IGNORED).sum().clamp_min(1)


class Found(NamedTuple):
    """Sums over the tokens of a chunk, before their weights, and what they ask of the logits."""

    lm: torch.Tensor
    kd: torch.Tensor
    gradient_CV: torch.Tensor


def losses_and_gradient(
    student_CV: torch.Tensor,
    teacher_CV: torch.Tensor | None,
    targets_C: torch.Tensor,
    *,
    lm_weight: torch.Tensor | None,
    kd_weight: float,
    temperature: float,
) -> Found:
    """`lm_loss` and `kd_loss` summed over tokens, and the gradient of their weighted sum, in few passes over [C, V].

    With p and q the student's and the teacher's softmax at temperature tau, the gradients with respect to the student's
    logits are p - onehot (at tau = 1) and tau (p - q).

    Args:
        lm_weight: of one token; None takes the loss without a gradient.
        kd_weight: of one token; without `teacher_CV` nothing is distilled.
    """
    student_CV = wide(student_CV)
    log_p = F.log_softmax(student_CV, dim=-1)
    counts_C1, targets_C1 = (targets_C != IGNORED).unsqueeze(1), targets_C.clamp_min(0).unsqueeze(1)
    lm = -(log_p.gather(1, targets_C1) * counts_C1).sum()
    gradient_CV = None
    if lm_weight is not None:
        weight_C1 = (counts_C1 * lm_weight).to(log_p.dtype)
        gradient_CV = (log_p.exp() * weight_C1).scatter_add_(1, targets_C1, -weight_C1)
    if teacher_CV is None:
        assert gradient_CV is not None, "no loss has a weight"
        return Found(lm, torch.zeros_like(lm), gradient_CV)
    teacher_CV = wide(teacher_CV)
    if temperature != 1.0:
        log_p, teacher_CV = F.log_softmax(student_CV / temperature, dim=-1), teacher_CV / temperature
    log_q = F.log_softmax(teacher_CV, dim=-1)
    ahead = log_q - log_p
    q = log_q.exp_()
    kd = temperature**2 * torch.linalg.vecdot(q, ahead).sum()
    pulled = log_p.exp_().sub_(q).mul_(kd_weight * temperature)
    return Found(lm, kd, pulled if gradient_CV is None else gradient_CV.add_(pulled))


class _GradientNow(torch.autograd.Function):
    """Weighted sum of the chunks' losses whose gradient is taken in the forward pass, while logits are at hand."""

    @staticmethod
    def forward(ctx: Any, student_TD: torch.Tensor, task: HeadTask) -> tuple[torch.Tensor, torch.Tensor]:
        gradient_TD = torch.empty_like(student_TD)
        parts = None
        for start in range(0, student_TD.shape[0], task.chunk_tokens):
            found, gradient_CD = task.learned(student_TD[start : start + task.chunk_tokens], start)
            gradient_TD[start : start + task.chunk_tokens] = gradient_CD
            parts = found if parts is None else parts + found
        assert parts is not None, "a batch without tokens"
        ctx.save_for_backward(gradient_TD)
        ctx.mark_non_differentiable(parts)
        return _weighted(parts, task.weights), parts

    @staticmethod
    def backward(ctx: Any, total: torch.Tensor, _parts: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient_TD,) = ctx.saved_tensors
        return gradient_TD * total, None


def _weighted(parts: torch.Tensor, weights: LossWeights) -> torch.Tensor:
    return weights.lm * parts[0] + weights.kd * parts[1]


def head_losses(task: HeadTask, student_TD: torch.Tensor, *, measuring: bool = False) -> HeadLosses:
    """Language-model and distillation loss of a batch; `measuring` takes the teacher's own loss as well."""
    wanted = bool(task.weights.lm or task.weights.kd)
    if student_TD.requires_grad and wanted and not measuring:
        total, parts = _GradientNow.apply(student_TD, task)  # type: ignore[no-untyped-call]
    else:
        with torch.no_grad():
            chunks = enumerate(student_TD.detach().split(task.chunk_tokens))
            found = [task.measured(chunk, i * task.chunk_tokens, measuring=measuring) for i, chunk in chunks]
            parts = torch.stack(found).sum(0)
            total = _weighted(parts, task.weights)
        if student_TD.requires_grad and task.weights.mse and not measuring:
            # FSDP puts a layer's weights together when its output's gradient arrives. With the layer loss alone the
            # last layer's output would never have one.
            total = total + 0 * wide(student_TD).sum()
    has_teacher = task.teacher_TD is not None
    return HeadLosses(
        total=total,
        lm=parts[0],
        kd=parts[1] if has_teacher and (task.weights.kd or measuring) else None,
        teacher_lm=parts[2] if has_teacher and measuring else None,
    )
