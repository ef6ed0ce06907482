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
    back_F = torch.argsort(tensors["neuron_ids"].long())
    gate_F, up_F = _stored_order(tensors, "gate_up", shape)
    biases = _stored_order(tensors, "gate_up_bias", shape) if "gate_up_bias" in tensors else None
    return DenseFFN(
        gate_FD=gate_F[back_F],
        up_FD=up_F[back_F],
        down_DF=tensors["down"][:, back_F],
        gate_bias_F=None if biases is None else biases[0][back_F],
        up_bias_F=None if biases is None else biases[1][back_F],
        down_bias_D=tensors.get("down_bias"),
    )


def shared_ffn(tensors: FactoredTensors, shape: FactorShape) -> DenseFFN:
    """The shared neurons alone as a narrower dense FFN of width S: what runs at K = 0."""
    s = shape.shared_size
    gate_S, up_S = tensors["shared_gate_up"].split(s)
    biases = tensors["shared_gate_up_bias"].split(s) if "shared_gate_up_bias" in tensors else (None, None)
    return DenseFFN(gate_S, up_S, tensors["down"][:, :s], biases[0], biases[1], tensors.get("down_bias"))


def _stored_order(tensors: FactoredTensors, name: str, shape: FactorShape) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up rows [F, ...] in storage order: shared neurons first, then expert after expert."""
    gate_NH, up_NH = tensors[name].split(shape.expert_size, dim=1)
    gate, up = gate_NH.flatten(0, 1), up_NH.flatten(0, 1)
    if shape.shared_size:
        shared_gate, shared_up = tensors[f"shared_{name}"].split(shape.shared_size)
        gate, up = torch.cat([shared_gate, gate]), torch.cat([shared_up, up])
    return gate, up
