"""The frozen dense FFNs that the student learns from, holding as little as they can twice.

A teacher FFN is the dense layer in the student's neuron order, with every expert on. Each of its tensors is the
student's own parameter where that is frozen and holds the same values; only what training will change is copied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from factorctl.config.finetune import TeacherStorage
from factorctl.contracts import DenseFFN, Partition
from factorctl.errors import ResourceError
from factorctl.ffn.layer import FactoredFFN
from factorctl.ffn.paths import gated
from factorctl.ffn.slicing import FactoredTensors, slice_ffn, stored_ffn


class Teacher(nn.Module, ABC):
    """A frozen dense FFN whose neurons lie in the student's order, in two halves: what they give, and their sum."""

    @abstractmethod
    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """act(gate x) * (up x) of every neuron, [..., F]."""

    @abstractmethod
    def output(self, hidden: torch.Tensor) -> torch.Tensor:
        """W_down of that, [..., D]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.hidden(x))


class TeacherFFN(Teacher):
    """The dense FFN from factored tensors: gate|up rows of all neurons, then one down-projection.

    Args:
        tensors: `gate_up`, `down` and, where the model has them, the shared rows and biases, as in `FactoredFFN`.
    """

    def __init__(self, student: FactoredFFN, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.activation = student.activation
        self.names = [name for name in tensors if name not in ("router", "neuron_ids")]
        for name in self.names:
            tensor = tensors[name]
            self.register_parameter(name, tensor if isinstance(tensor, nn.Parameter) else _frozen(tensor))

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        own = dict(self.named_parameters())
        x = x.to(own["down"].dtype)
        hidden = self._gated(x, own["gate_up"].flatten(0, 1), own.get("gate_up_bias"), own["gate_up"].shape[0])
        if "shared_gate_up" in own:
            shared = self._gated(x, own["shared_gate_up"], own.get("shared_gate_up_bias"), 1)
            hidden = torch.cat([shared, hidden], dim=-1)
        return hidden

    def output(self, hidden: torch.Tensor) -> torch.Tensor:
        own = dict(self.named_parameters())
        return F.linear(hidden, own["down"], own.get("down_bias"))

    def _gated(self, x: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None, groups: int) -> torch.Tensor:
        """act(gate x) * (up x) of rows that lie as gate, up, gate, up, ... in `groups` pairs."""
        pairs = F.linear(x, rows, None if bias is None else bias.flatten()).unflatten(-1, (groups, -1))
        return gated(pairs, self.activation).flatten(-2)


def dense_tensors(student: FactoredFFN, ffn: DenseFFN) -> FactoredTensors:
    """The dense source's values in the student's neuron order."""
    ids, shape = student.neuron_ids.long().cpu(), student.shape
    experts_NH = ids[shape.shared_size :].view(shape.num_experts, shape.expert_size)
    partition = Partition(experts_NH, ids[: shape.shared_size] if shape.shared_size else None)
    tensors = slice_ffn(ffn, partition, torch.empty(0))
    return {name: tensor for name, tensor in tensors.items() if name not in ("router", "neuron_ids")}


def own_tensors(student: FactoredFFN) -> FactoredTensors:
    """The student's values, for a student that still holds the dense ones."""
    return {name: p.detach() for name, p in student.named_parameters() if name != "router"}


def teacher_ffn(student: FactoredFFN, tensors: FactoredTensors, storage: TeacherStorage, dtype: torch.dtype) -> Teacher:
    """The frozen teacher of one layer, stored as asked; call it once the student's `requires_grad` are settled.

    Raises:
        ResourceError: 8- or 4-bit storage without a CUDA device.
    """
    if storage in ("8bit", "4bit"):
        return quantised_teacher(student, tensors, storage)
    if storage == "bf16":
        dtype = torch.bfloat16
    return TeacherFFN(student, {name: _shared_or_copied(student, name, t, dtype) for name, t in tensors.items()})


def _shared_or_copied(student: FactoredFFN, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    own = student.get_parameter(name)
    wanted = tensor.to(device=own.device, dtype=dtype)
    if not own.requires_grad and own.dtype == dtype and torch.equal(own, wanted):
        return own
    return wanted.clone() if wanted.data_ptr() == own.data_ptr() else wanted


def require_cuda_for(storage: TeacherStorage, device: torch.device) -> None:
    """Refuse a quantised teacher where bitsandbytes would not save memory.

    Raises:
        ResourceError: there is no CUDA device in use.
    """
    if storage in ("8bit", "4bit") and device.type != "cuda":
        raise ResourceError(
            f"--teacher-quant {storage} needs a CUDA device; this run computes on {device.type}",
            "choose --teacher-quant bf16 or none",
        )


def quantised_teacher(student: FactoredFFN, tensors: FactoredTensors, storage: TeacherStorage) -> Teacher:
    """The dense FFN with bitsandbytes weights: LLM.int8 for 8bit, NF4 for 4bit; biases stay as they are."""
    require_cuda_for(storage, student.down.device)
    return QuantisedTeacher(student, tensors, storage)


class QuantisedTeacher(Teacher):
    """gate|up and down as bitsandbytes linears, quantised when they are moved to the GPU."""

    def __init__(self, student: FactoredFFN, tensors: FactoredTensors, storage: TeacherStorage) -> None:
        super().__init__()
        dense, device = stored_ffn(tensors, student.shape, student.shape.num_experts), student.down.device
        biases = [bias for bias in (dense.gate_bias_F, dense.up_bias_F) if bias is not None]
        bias = torch.cat(biases) if biases else None
        self.activation = student.activation
        self.gate_up = _bnb_linear(torch.cat([dense.gate_FD, dense.up_FD]), bias, storage, device)
        self.down = _bnb_linear(dense.down_DF, dense.down_bias_D, storage, device)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return gated(self.gate_up(x.to(torch.bfloat16)), self.activation)

    def output(self, hidden: torch.Tensor) -> torch.Tensor:
        t: torch.Tensor = self.down(hidden)
        return t


def _bnb_linear(
    weight: torch.Tensor, bias: torch.Tensor | None, storage: TeacherStorage, device: torch.device
) -> nn.Module:
    from bitsandbytes import nn as bnb_nn

    bnb: Any = bnb_nn  # exports by import, which mypy does not count
    outputs, inputs = weight.shape
    linear: Any
    if storage == "8bit":
        linear = bnb.Linear8bitLt(inputs, outputs, bias=bias is not None, has_fp16_weights=False)
        linear.weight = bnb.Int8Params(weight.contiguous(), has_fp16_weights=False, requires_grad=False)
    else:
        linear = bnb.Linear4bit(inputs, outputs, bias=bias is not None, compute_dtype=torch.bfloat16, quant_type="nf4")
        linear.weight = bnb.Params4bit(weight.contiguous(), requires_grad=False, quant_type="nf4")
    if bias is not None:
        linear.bias = _frozen(bias.to(torch.bfloat16))
    moved: nn.Module = linear.to(device)
    return moved


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
