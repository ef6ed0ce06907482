"""Factored FFNs and the rest of their dense source put together as one model in memory; nothing is written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from factorctl.checkpoint.reader import CheckpointReader
from factorctl.ffn.slicing import FactoredTensors
from factorctl.ffn.spec import FactoredSpec
from factorctl.models.building import empty_dense_model, empty_factored_model
from factorctl.models.families import DenseModel, ffn_prefix
from factorctl.models.filling import adopt, check_names, expected_tensors, stored_tensors


def assembled(
    dense: DenseModel,
    spec: FactoredSpec,
    reader: CheckpointReader,
    layers: list[FactoredTensors],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    """A factored model in memory: its FFNs from `layers`, which are used up, everything else as in the dense source."""
    model = empty_factored_model(dense, spec)
    replaced = {name for layer in range(dense.num_layers) for name in dense.ffn_tensor_names(layer).values()}
    kept = [name for name in stored_tensors(empty_dense_model(dense), reader) if name not in replaced]
    state = {name: _placed(reader.read(name), dtype, device) for name in kept}
    for layer in range(dense.num_layers):
        tensors: Mapping[str, torch.Tensor] = layers[layer]
        state |= {f"{ffn_prefix(layer)}.{name}": _placed(tensor, dtype, device) for name, tensor in tensors.items()}
        layers[layer] = {}
    check_names(
        expected_tensors(model), {name: tuple(tensor.shape) for name, tensor in state.items()}, reader.directory
    )
    adopt(model, state, device)
    return model


def _placed(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
