"""A factored model, its dense teacher and the losses between them, as one module that a data-parallel wrapper can hold.

T tokens, D hidden_size, N num_experts, B sequences, L their length.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from factorctl.training.head_losses import HeadLosses, HeadTask, chunk_tokens, head_losses
from factorctl.training.losses import IGNORED, next_tokens
from factorctl.training.presets import LossWeights
from factorctl.training.twin_ffn import LayerReport, TwinOptions, acting_as, recording, twins


class StepReport(NamedTuple):
    """Everything about one micro-batch; all but `total` without gradient. Router values are means over layers."""

    total: torch.Tensor
    lm: torch.Tensor
    kd: torch.Tensor | None
    par: torch.Tensor | None
    mse: torch.Tensor | None
    balance: torch.Tensor | None
    z: torch.Tensor | None
    agreement: torch.Tensor | None
    """Share of the teacher's labels that the routers chose."""
    load_LN: torch.Tensor | None
    """Tokens that chose each expert, by layer."""
    teacher_lm: torch.Tensor | None
    counted: torch.Tensor
    """Tokens that `lm` is a mean over."""


class Distiller(nn.Module):
    """Runs a batch through teacher and student and adds up the losses.

    Args:
        model: a transformers model whose FFNs are `TwinFFN`s with these `options`.
        temperature: of the logit distillation.
    """

    def __init__(self, model: PreTrainedModel, options: TwinOptions, temperature: float) -> None:
        super().__init__()
        self.model, self.options, self.temperature = model, options, temperature
        for twin in twins(model):
            assert twin.options is options, "all layers change roles together"

    @property
    def needs_teacher(self) -> bool:
        weights = self.options.weights
        routed = any(twin.routes for twin in twins(self.model))
        return bool(weights.kd or weights.mse or (weights.par and routed))

    def forward(self, input_ids_BL: torch.Tensor, position_ids_BL: torch.Tensor, measuring: bool = False) -> StepReport:
        """Losses of one micro-batch; `measuring` also takes the teacher's language-model loss and every label.

        Positions restart at 0 at each document: that keeps attention inside documents, and the first token of a
        document is no one's target.
        """
        teacher_TD = None
        self._forget()
        with self._autocast(input_ids_BL.device):
            if measuring or self.needs_teacher:
                with torch.no_grad(), acting_as(self.options, "teacher"):
                    teacher_TD = self._hidden(input_ids_BL, position_ids_BL)
            with recording(self.options):
                student_TD = self._hidden(input_ids_BL, position_ids_BL)
            targets_T = next_tokens(input_ids_BL, position_ids_BL).flatten()
            chunk = chunk_tokens(input_ids_BL.device, self.model.config.vocab_size)
            task = HeadTask(self._logits, targets_T, teacher_TD, self.options.weights, self.temperature, chunk)
            head = head_losses(task, student_TD, measuring=measuring)
        reports = [twin.report for twin in twins(self.model) if twin.report is not None]
        for twin in twins(self.model):
            twin.report = None
        return _step_report(head, reports, self.options.weights, (targets_T != IGNORED).sum())

    def _hidden(self, input_ids_BL: torch.Tensor, position_ids_BL: torch.Tensor) -> torch.Tensor:
        """The last hidden state behind the final norm, [T, D]."""
        output = self.model.model(
            input_ids=input_ids_BL, position_ids=position_ids_BL, attention_mask=None, use_cache=False
        )
        hidden_TD: torch.Tensor = output.last_hidden_state.flatten(0, 1)
        return hidden_TD

    def _logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        logits_TV: torch.Tensor = self.model.lm_head(hidden_TD)
        cap = getattr(self.model.config, "final_logit_softcapping", None)  # Gemma 2
        return logits_TV if cap is None else cap * torch.tanh(logits_TV / cap)

    def _autocast(self, device: torch.device) -> torch.autocast:
        dtype = self.options.compute_dtype
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)

    def _forget(self) -> None:
        """Let go of the last batch's hints. They outlive its forward pass: gradient checkpointing runs layers again."""
        for twin in twins(self.model):
            twin.hint = None


def _step_report(
    head: HeadLosses, reports: list[LayerReport], weights: LossWeights, counted: torch.Tensor
) -> StepReport:
    parts = {name: _mean(getattr(report, name) for report in reports) for name in ("par", "mse", "balance", "z")}
    total = head.total
    for name, value in parts.items():
        if value is not None and getattr(weights, name):
            total = total + getattr(weights, name) * value
    loads = [report.load_N for report in reports if report.load_N is not None]
    return StepReport(
        total=total,
        lm=head.lm,
        kd=head.kd,
        **{name: None if value is None else value.detach() for name, value in parts.items()},
        agreement=_mean(report.agreement for report in reports),
        load_LN=torch.stack(loads) if loads else None,
        teacher_lm=head.teacher_lm,
        counted=counted,
    )


def _mean(values: Iterable[torch.Tensor | None]) -> torch.Tensor | None:
    known = [value for value in values if value is not None]
    return torch.stack(known).mean() if known else None
