"""Factored FFNs and the rest of their dense source put together as one model in memory; nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from factorctl.checkpoint.reader import CheckpointReader
from factorctl.config.shape import FactorShape
from factorctl.contracts import Partition
from factorctl.ffn.slicing import FactoredTensors, slice_ffn
from factorctl.ffn.spec import FactoredSpec
from factorctl.models.building import empty_dense_model, empty_factored_model, factored_ffns
from factorctl.models.families import DenseModel, ffn_prefix, read_dense_model
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
    """A factored model in memory that runs as a loaded checkpoint does.

    Args:
        layers: the tensors of its FFNs, which are used up; everything else is as in the dense source.
    """
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
    for ffn in factored_ffns(model):
        ffn.keep_experts_together()
    return model


def dense_twin(source: Path, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The dense model in factorctl's own runtime, so that a speed beside it is that of the model and not of a library.

    Every FFN is one expert that is always on, which is the dense FFN, on the paths and kernel of a factored one.

    Raises:
        IntegrityError: a tensor is damaged, missing, unexpected or misshaped.
    """
    dense, reader = read_dense_model(source), CheckpointReader(source)
    spec = FactoredSpec(FactorShape(1, 1, dense.intermediate_size, 0), "softmax", "sum")
    whole = Partition(torch.arange(dense.intermediate_size)[None])
    router_ND = torch.zeros(1, dense.hidden_size)
    layers = [slice_ffn(dense.read_ffn(layer, reader.read), whole, router_ND) for layer in range(dense.num_layers)]
    return assembled(dense, spec, reader, layers, dtype=dtype, device=device)


def _placed(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
