"""Moving a dense FFN's values into expert order and back. No value is computed, only moved."""

from __future__ import annotations

import torch

from factorctl.config.shape import FactorShape
from factorctl.contracts import DenseFFN, Partition

FactoredTensors = dict[str, torch.Tensor]
"""Parameter name of `FactoredFFN` -> tensor."""


def slice_ffn(ffn: DenseFFN, partition: Partition, router_ND: torch.Tensor) -> FactoredTensors:
    """The tensors of the factored FFN: neurons permuted, shared ones first, then expert after expert."""
    order_F = partition.permutation_F
    experts_NH, shared_S = partition.experts_NH, partition.shared_S
    tensors = {
        "gate_up": torch.cat([ffn.gate_FD[experts_NH], ffn.up_FD[experts_NH]], dim=1),
        "down": ffn.down_DF[:, order_F],
        "router": router_ND,
        "neuron_ids": order_F.to(torch.int32),
    }
    if shared_S is not None:
        tensors["shared_gate_up"] = torch.cat([ffn.gate_FD[shared_S], ffn.up_FD[shared_S]])
    if ffn.gate_bias_F is not None and ffn.up_bias_F is not None:
        tensors["gate_up_bias"] = torch.cat([ffn.gate_bias_F[experts_NH], ffn.up_bias_F[experts_NH]], dim=1)
        if shared_S is not None:
            tensors["shared_gate_up_bias"] = torch.cat([ffn.gate_bias_F[shared_S], ffn.up_bias_F[shared_S]])
    if ffn.down_bias_D is not None:
        tensors["down_bias"] = ffn.down_bias_D
    return tensors


def unslice_ffn(tensors: FactoredTensors, shape: FactorShape) -> DenseFFN:
    """The dense FFN again, every neuron back in its source position: the inverse of `slice_ffn`."""
    return stored_ffn(tensors, shape, shape.num_experts).select(torch.argsort(tensors["neuron_ids"].long()))


def shared_ffn(tensors: FactoredTensors, shape: FactorShape) -> DenseFFN:
    """The shared neurons alone as a narrower dense FFN of width S: what runs at K = 0."""
    return stored_ffn(tensors, shape, 0)


def stored_ffn(tensors: FactoredTensors, shape: FactorShape, experts: int) -> DenseFFN:
    """The shared neurons and the first `experts` experts as a dense FFN, in storage order."""
    gate_F, up_F = _unpacked(tensors, "gate_up", experts)
    biased = "gate_up_bias" in tensors
    gate_bias_F, up_bias_F = _unpacked(tensors, "gate_up_bias", experts) if biased else (None, None)
    down_DF = tensors["down"][:, : shape.shared_size + experts * shape.expert_size]
    return DenseFFN(gate_F, up_F, down_DF, gate_bias_F, up_bias_F, tensors.get("down_bias"))


def _unpacked(tensors: FactoredTensors, name: str, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up rows [S + experts * H, ...]."""
    gate, up = (half.flatten(0, 1) for half in tensors[name][:experts].chunk(2, dim=1))
    if f"shared_{name}" in tensors:
        shared_gate, shared_up = tensors[f"shared_{name}"].chunk(2)
        return torch.cat([shared_gate, gate]), torch.cat([shared_up, up])
    return gate, up
