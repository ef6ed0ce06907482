"""One layer's FFN in two roles: the frozen dense teacher and the factored student, in the same decoder layer.

Teacher and student share everything of the model but their FFNs, so one model runs twice: first as the teacher, a true
dense forward in which every layer hands PAR labels (and, for the layer loss, its output) to its twin, then as the
student. Nothing else of the teacher's pass is kept.

The router learns its labels on the *student's* own input: that is what it will see when the model is used, and behind
routed layers it is not the teacher's. The labels themselves come from the teacher's input and output, as the maths has
it: on the student's drifting input the teacher's output would be no target. Router losses stop at that input; they
train routers, not the layers below.

T tokens, D hidden_size, N num_experts, K top_k.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from factorctl.models.building import decoder_layers
from factorctl.models.factored_ffn import FactoredFFN
from factorctl.training.losses import agreement, balance_loss, expert_counts, mse_loss, par_labels, par_loss, z_loss
from factorctl.training.presets import LossWeights

Role = Literal["teacher", "student"]


class Hint(NamedTuple):
    """What the teacher's pass leaves for the student's in one layer."""

    labels_TK: torch.Tensor | None
    t_TD: torch.Tensor | None


class LayerReport(NamedTuple):
    """What the student's pass found in one layer; None where nobody asked or nothing is routed."""

    par: torch.Tensor | None
    mse: torch.Tensor | None
    balance: torch.Tensor | None
    z: torch.Tensor | None
    agreement: torch.Tensor | None
    load_N: torch.Tensor | None
    """Tokens that chose each expert."""


@dataclass
class TwinOptions:
    """What every layer of a model measures; one object for all of them."""

    weights: LossWeights
    label_share: float | None
    """Part of the target that an expert is compared with; None takes 1/a, what its output counts for in the sum."""
    compute_dtype: torch.dtype
    role: Role = "student"
    recording: bool = False
    """Whether the layers leave reports. Gradient checkpointing runs them a second time, when nobody reads these."""


class TwinFFN(nn.Module):
    """Takes the place of a decoder layer's FFN while it is trained.

    Args:
        student: the FFN that is trained; float32 values, computed in `options.compute_dtype`, its router in float32.
        teacher: the frozen dense FFN.
    """

    def __init__(self, student: FactoredFFN, teacher: nn.Module, options: TwinOptions) -> None:
        super().__init__()
        self.student, self.teacher, self.options = student, teacher, options
        self.hint: Hint | None = None
        self.report: LayerReport | None = None

    @property
    def routes(self) -> bool:
        """Whether there is a choice between experts at all: 0 < K < N."""
        return 0 < self.student.top_k < self.student.shape.num_experts

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.to(self.options.compute_dtype)
        with torch.autocast(x.device.type, enabled=False):
            y = self._teach(x) if self.options.role == "teacher" else self._study(x)
        return y.to(hidden_states.dtype)

    def _teach(self, x: torch.Tensor) -> torch.Tensor:
        t: torch.Tensor = self.teacher(x).to(x.dtype)  # the teacher may be stored, and so compute, in half precision
        x_TD, t_TD = x.flatten(0, -2), t.flatten(0, -2)
        self.hint = Hint(
            labels_TK=self._labels(x_TD, t_TD) if self.routes else None,
            t_TD=t_TD if self.options.weights.mse else None,
        )
        return t

    def _labels(self, x_TD: torch.Tensor, t_TD: torch.Tensor) -> torch.Tensor:
        share = self.options.label_share
        labeller = _Labeller(self.student, 1 / self.student.scale_a if share is None else share)
        weights = {f"student.{name}": tensor for name, tensor in self._computed().items()}
        labels_TK: torch.Tensor = functional_call(labeller, weights, (x_TD, t_TD))
        return labels_TK

    def _study(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = functional_call(self.student, self._computed(), (x,))
        report = self._reported(x.detach().flatten(0, -2), y.flatten(0, -2))
        self.report = report if self.options.recording else None
        return y

    def _computed(self) -> dict[str, torch.Tensor]:
        """The student's parameters as they compute: in the compute dtype, but for the router."""
        dtype = self.options.compute_dtype
        return {n: p if n == "router" else p.to(dtype) for n, p in self.student.named_parameters()}

    def _reported(self, x_TD: torch.Tensor, y_TD: torch.Tensor) -> LayerReport:
        labels_TK, t_TD = self.hint or Hint(None, None)
        mse = mse_loss(y_TD, t_TD) if t_TD is not None else None
        if not self.routes:
            return LayerReport(None, mse, None, None, None, None)
        weights = self.options.weights
        logits_TN = self.student.router_logits(x_TD)
        chosen_TK = logits_TN.detach().topk(self.student.top_k, dim=-1).indices
        return LayerReport(
            par=par_loss(logits_TN, labels_TK) if labels_TK is not None else None,
            mse=mse,
            balance=balance_loss(logits_TN, chosen_TK) if weights.balance else None,
            z=z_loss(logits_TN) if weights.z else None,
            agreement=agreement(chosen_TK, labels_TK) if labels_TK is not None else None,
            load_N=expert_counts(chosen_TK, self.student.shape.num_experts),
        )


class _Labeller(nn.Module):
    """`par_labels` as a module, so that it can be called with other weights than the stored ones."""

    def __init__(self, student: FactoredFFN, share: float) -> None:
        super().__init__()
        self.student, self.share = student, share

    def forward(self, x_TD: torch.Tensor, t_TD: torch.Tensor) -> torch.Tensor:
        return par_labels(self.student, x_TD, t_TD, self.share)


def twins(model: PreTrainedModel) -> list[TwinFFN]:
    """The twin FFNs of a model in training, from the first layer to the last."""
    return [block.mlp for block in decoder_layers(model) if isinstance(block.mlp, TwinFFN)]


@contextmanager
def acting_as(options: TwinOptions, role: Role) -> Iterator[None]:
    """Let every layer run in `role` while the block runs."""
    previous, options.role = options.role, role
    try:
        yield
    finally:
        options.role = previous


@contextmanager
def recording(options: TwinOptions) -> Iterator[None]:
    """Let every layer leave its report while the block runs."""
    options.recording = True
    try:
        yield
    finally:
        options.recording = False
