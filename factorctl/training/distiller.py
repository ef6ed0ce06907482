"""A factored model, its dense teacher and the losses between them, as one module that a data-parallel wrapper can hold.

T tokens, D hidden_size, N num_experts, B sequences, L their length.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from factorctl.training.head_losses import HeadLosses, HeadTask, chunk_tokens, head_losses
from factorctl.training.losses import IGNORED, next_tokens
from factorctl.training.presets import LossWeights
from factorctl.training.twin_ffn import LayerReport, TwinOptions, acting_as, labelling, recording, twins


class StepReport(NamedTuple):
    """Everything about one micro-batch; all but `total` without gradient. Router values are means over layers."""

    total: torch.Tensor
    lm: torch.Tensor | None
    """None while layers heal: the head does not run then."""
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
        return bool(weights.kd or weights.mse or (routed and (weights.par or self.options.refresh_target)))

    def forward(
        self,
        input_ids_BL: torch.Tensor,
        position_ids_BL: torch.Tensor,
        measuring: bool = False,
        healing: bool = False,
    ) -> StepReport:
        """Losses of one micro-batch.

        Args:
            measuring: also take the teacher's language-model loss and every label.
            healing: of what is measured on outputs, take each layer's own loss alone: how far its output is from its
                dense FFN's on the same input.

        Positions restart at 0 at each document: that keeps attention inside documents, and the first token of a
        document is no one's target.
        """
        self._forget()
        self.options.role = "healing" if healing else "student"
        if healing:
            return self._healed(input_ids_BL, position_ids_BL)
        teacher_TD = None
        with self._autocast(input_ids_BL.device):
            if measuring or self.needs_teacher:
                with torch.no_grad(), acting_as(self.options, "teacher"), labelling(self.options, measuring):
                    teacher_TD = self._hidden(input_ids_BL, position_ids_BL)
            with recording(self.options):
                student_TD = self._hidden(input_ids_BL, position_ids_BL)
            targets_T = next_tokens(input_ids_BL, position_ids_BL).flatten()
            chunk = chunk_tokens(input_ids_BL.device, self.model.config.vocab_size)
            task = HeadTask(self._logits, targets_T, teacher_TD, self.options.weights, self.temperature, chunk)
            head = head_losses(task, student_TD, measuring=measuring)
        return _step_report(head, self._reports(), self.options.weights, (targets_T != IGNORED).sum())

    def _healed(self, input_ids_BL: torch.Tensor, position_ids_BL: torch.Tensor) -> StepReport:
        with self._autocast(input_ids_BL.device), recording(self.options):
            self._hidden(input_ids_BL, position_ids_BL)
        counted = torch.tensor(input_ids_BL.numel(), device=input_ids_BL.device)
        return _step_report(None, self._reports(), replace(self.options.weights, mse=1.0), counted)

    def _reports(self) -> list[LayerReport]:
        """What the layers left, taken away."""
        reports = [twin.report for twin in twins(self.model) if twin.report is not None]
        for twin in twins(self.model):
            twin.report = None
        return reports

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
    head: HeadLosses | None, reports: list[LayerReport], weights: LossWeights, counted: torch.Tensor
) -> StepReport:
    parts = {name: _mean(getattr(report, name) for report in reports) for name in ("par", "mse", "balance", "z")}
    terms = [] if head is None else [head.total]
    terms += [
        getattr(weights, name) * value for name, value in parts.items() if value is not None and getattr(weights, name)
    ]
    loads = [report.load_N for report in reports if report.load_N is not None]
    return StepReport(
        total=sum(terms[1:], terms[0]),
        lm=None if head is None else head.lm,
        kd=None if head is None else head.kd,
        **{name: None if value is None else value.detach() for name, value in parts.items()},
        agreement=_mean(report.agreement for report in reports),
        load_LN=torch.stack(loads) if loads else None,
        teacher_lm=None if head is None else head.teacher_lm,
        counted=counted,
    )


def _mean(values: Iterable[torch.Tensor | None]) -> torch.Tensor | None:
    known = [value for value in values if value is not None]
    return torch.stack(known).mean() if known else None
