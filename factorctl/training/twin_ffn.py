"""One layer's FFN in two roles: the frozen dense teacher and the factored student, in the same decoder layer.

Teacher and student share everything of the model but their FFNs, so one model runs twice: first as the teacher, a true
dense forward in which every layer hands PAR labels (and, for the layer loss, its output) to its twin, then as the
student. Nothing else of the teacher's pass is kept.

The router learns its labels on the *student's* own input: that is what it will see when the model is used, and behind
routed layers it is not the teacher's. The labels themselves come from the teacher's input and output, as the maths has
it: on the student's drifting input the teacher's output would be no target. Router losses stop at that input; they
train routers, not the layers below.

A third role heals layer by layer: the model runs once, as the student, and each layer learns what its dense FFN gives
on the very input that the layers below it left. No gradient leaves a layer, so neither attention nor head is asked.

While it is trained the student's `router` holds `reach` V with V the selection, and the layer computes with `sharpness`
V: see `selection`.

T tokens, D hidden_size, N num_experts, K top_k.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import PreTrainedModel

from factorctl.config.finetune import LabelSource, RefreshTarget
from factorctl.ffn.labels import distances_of_hidden, distances_to_target, nearest
from factorctl.ffn.layer import FactoredFFN
from factorctl.ffn.paths import ExpertWeights, hidden_of_all
from factorctl.ffn.ridge import RidgeMoments
from factorctl.models.building import decoder_layers
from factorctl.training.losses import agreement, balance_loss, expert_counts, mse_loss, par_loss, wide, z_loss
from factorctl.training.optimizers import has_learning_gate
from factorctl.training.presets import LossWeights
from factorctl.training.straight_through import as_if_all_ran
from factorctl.training.teacher import Teacher

Role = Literal["teacher", "student", "healing"]


class Hint(NamedTuple):
    """What a layer's teacher says of one batch; None where nobody asks or nothing is routed."""

    labels_TK: torch.Tensor | None
    refresh_TN: torch.Tensor | None
    """What the routers are fitted to when they are refreshed, less its mean over the experts."""
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
    router_temperature: float = 1.0
    """What the logits are divided by in the routers' own losses."""
    learns_sharpness: bool = False
    """Whether the sharpness of the gates is trained, where some loss reaches it."""
    labels_from: LabelSource = "student"
    """Whose neurons, behind the student's down-projection, labels compare; the teacher's are at hand."""
    straight_through: bool = False
    """Whether the outputs of all experts inform the choice."""
    refresh_target: RefreshTarget | None = None
    """What layers collect for a refresh of their routers; None where there is none."""
    role: Role = "student"
    """Healing or student until the backward pass is over: gradient checkpointing runs layers again in it."""
    recording: bool = False
    """Whether the layers leave reports. Gradient checkpointing runs them a second time, when nobody reads these."""
    measuring: bool = False
    """Whether labels are wanted, used or not."""

    @property
    def wants_labels(self) -> bool:
        return bool(self.weights.par) or self.measuring or self.refresh_target == "labels"


class TwinFFN(nn.Module):
    """Takes the place of a decoder layer's FFN while it is trained.

    Args:
        student: the FFN that is trained; float32 values, computed in `options.compute_dtype`, its router in float32.
        teacher: the frozen dense FFN.
    """

    def __init__(self, student: FactoredFFN, teacher: Teacher, options: TwinOptions) -> None:
        super().__init__()
        self.student, self.teacher, self.options = student, teacher, options
        router = student.router
        reached = router.requires_grad and options.weights.on_outputs and has_learning_gate(student)
        one = torch.ones(1, dtype=router.dtype, device=router.device)
        self.sharpness = nn.Parameter(one, requires_grad=options.learns_sharpness and reached)
        """What the selection is multiplied by to give the router, [1]."""
        self.reach = nn.Parameter(one.clone(), requires_grad=False)
        """How far a logit moves when every weight of its row moves by 1, [1]; set once, by `to_unit_spread`."""
        collects = options.refresh_target is not None and self.routes and router.requires_grad
        self.moments = RidgeMoments(router.shape[1], router.shape[0], router.device) if collects else None
        self.hint: Hint | None = None
        self.report: LayerReport | None = None

    @property
    def routes(self) -> bool:
        """Whether there is a choice between experts at all: 0 < K < N."""
        return self.student.routes

    def selection(self) -> torch.Tensor:
        """V, [N, D]: experts are chosen by the largest V x."""
        return self.student.router / self.reach

    def stored_router(self) -> torch.Tensor:
        """The router as a checkpoint has it, [N, D]."""
        return self.selection() * self.sharpness

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.to(self.options.compute_dtype)
        run = {"teacher": self._teach, "student": self._study, "healing": self._heal}[self.options.role]
        with torch.autocast(x.device.type, enabled=False):
            y = run(x)
        return y.to(hidden_states.dtype)

    def _teach(self, x: torch.Tensor) -> torch.Tensor:
        self.hint, t = self._taught(x, keeps_output=bool(self.options.weights.mse))
        return t

    def _study(self, x: torch.Tensor) -> torch.Tensor:
        y = self._output(x)
        self._leave_report(x, y, self.hint or Hint(None, None, None))
        return y

    def _heal(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach()
        with torch.no_grad():
            hint, _ = self._taught(x, keeps_output=True)
        y = self._output(x)
        self._leave_report(x, y, hint)
        return y.detach()

    def _taught(self, x: torch.Tensor, *, keeps_output: bool) -> tuple[Hint, torch.Tensor]:
        """What the teacher says of x, and its output. It may be stored, and so compute, in half precision."""
        hidden = self.teacher.hidden(x)
        t: torch.Tensor = self.teacher.output(hidden).to(x.dtype)
        t_TD = t.flatten(0, -2)
        labels_TK = refresh_TN = None
        if self.routes and (self.options.wants_labels or self.moments is not None):
            known = hidden.to(x.dtype) if self.options.labels_from == "teacher" else x
            distances_TN = self._distances(known.flatten(0, -2), t_TD)
            labels_TK = nearest(distances_TN, self.student.top_k) if self.options.wants_labels else None
            if self.moments is not None and self.options.refresh_target == "benefits":
                refresh_TN = -distances_TN * wide(t_TD).square().mean(1, keepdim=True).clamp_min(1e-30).rsqrt()
            elif self.moments is not None and labels_TK is not None:
                refresh_TN = torch.zeros_like(distances_TN).scatter_(1, labels_TK, 1.0)
            if refresh_TN is not None:
                refresh_TN = refresh_TN - refresh_TN.mean(1, keepdim=True)
        return Hint(labels_TK, refresh_TN, t_TD if keeps_output else None), t

    def _distances(self, known: torch.Tensor, t_TD: torch.Tensor) -> torch.Tensor:
        """Of every expert, [T, N], from the layer's input or from what the teacher's neurons made of it."""
        share = self.options.label_share
        judge = _Judge(self.student, 1 / self.student.scale_a if share is None else share, self.options.labels_from)
        names = {"down", "down_bias"} if self.options.labels_from == "teacher" else None
        weights = {f"student.{name}": tensor for name, tensor in self._computed(names).items()}
        distances_TN: torch.Tensor = functional_call(judge, weights, (known, t_TD))
        return distances_TN

    def _output(self, x: torch.Tensor) -> torch.Tensor:
        """The student's output; with `straight_through` the gates teach the sharpness alone, and all experts V."""
        values = self._computed()
        through = self.options.straight_through and self.student.router.requires_grad and torch.is_grad_enabled()
        if not (through and self.routes):
            y: torch.Tensor = functional_call(self.student, values, (x,))
            return y
        values["router"] = self.selection().detach() * self.sharpness
        y = functional_call(self.student, values, (x,))
        x_TD, s = x.detach().flatten(0, -2), self.student.scale_a * self.student.top_k
        down_DR = values["down"].detach()[:, self.student.shape.shared_size :]
        with torch.no_grad():
            bias = values.get("gate_up_bias")
            experts = ExpertWeights(values["gate_up"], down_DR, bias, self.student.activation)
            hidden_TNH = hidden_of_all(x_TD, experts)
        weight_TN = s * self._logits(x_TD).softmax(-1)
        return as_if_all_ran(y.flatten(0, -2), weight_TN, hidden_TNH, down_DR).view_as(y)

    def _computed(self, names: Container[str] | None = None) -> dict[str, torch.Tensor]:
        """The student's parameters, or those of `names`, as they compute: in the compute dtype, but for the router, at
        its own scale."""
        dtype = self.options.compute_dtype
        own = {name: p for name, p in self.student.named_parameters() if names is None or name in names}
        return {name: self.stored_router() if name == "router" else p.to(dtype) for name, p in own.items()}

    def _logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        """V x over the temperature of the router's own losses, [T, N]."""
        selection_ND = self.selection()
        return F.linear(x_TD.to(selection_ND.dtype), selection_ND) / self.options.router_temperature

    def _leave_report(self, x: torch.Tensor, y: torch.Tensor, hint: Hint) -> None:
        x_TD = x.detach().flatten(0, -2)
        report = self._reported(x_TD, y.flatten(0, -2), hint)
        if self.options.recording:
            self.report = report
            if self.moments is not None and hint.refresh_TN is not None and torch.is_grad_enabled():
                with torch.no_grad():
                    self.moments.add(wide(x_TD), hint.refresh_TN.to(self.moments.upper_II.dtype))

    def _reported(self, x_TD: torch.Tensor, y_TD: torch.Tensor, hint: Hint) -> LayerReport:
        labels_TK, _, t_TD = hint
        mse = mse_loss(y_TD, t_TD) if t_TD is not None else None
        if not self.routes:
            return LayerReport(None, mse, None, None, None, None)
        weights = self.options.weights
        logits_TN = self._logits(x_TD)
        chooser = self.student.chooser
        chosen_TK = chooser(x_TD) if chooser else logits_TN.detach().topk(self.student.top_k, dim=-1).indices
        return LayerReport(
            par=par_loss(logits_TN, labels_TK) if labels_TK is not None and chooser is None else None,
            mse=mse,
            balance=balance_loss(logits_TN, chosen_TK) if weights.balance else None,
            z=z_loss(logits_TN) if weights.z else None,
            agreement=agreement(chosen_TK, labels_TK) if labels_TK is not None else None,
            load_N=expert_counts(chosen_TK, self.student.shape.num_experts),
        )


class _Judge(nn.Module):
    """An expert's distance to its target as a module, so that it can be called with other weights than the stored."""

    def __init__(self, student: FactoredFFN, share: float, source: LabelSource) -> None:
        super().__init__()
        self.student, self.share = student, share
        self.judged = distances_of_hidden if source == "teacher" else distances_to_target

    def forward(self, known: torch.Tensor, t_TD: torch.Tensor) -> torch.Tensor:
        return self.judged(self.student, known, t_TD, self.share)


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


@contextmanager
def labelling(options: TwinOptions, wanted: bool) -> Iterator[None]:
    """Let every layer take its labels while the block runs, also where no loss uses them."""
    options.measuring = wanted
    try:
        yield
    finally:
        options.measuring = False
