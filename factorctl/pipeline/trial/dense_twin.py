"""The dense model in factorctl's own runtime, so that a speed beside it is that of the model and not of a library."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from factorctl.checkpoint.reader import CheckpointReader
from factorctl.config.shape import FactorShape
from factorctl.contracts import Partition
from factorctl.ffn.slicing import slice_ffn
from factorctl.ffn.spec import FactoredSpec
from factorctl.models.assembling import assembled
from factorctl.models.families import read_dense_model


def dense_twin(source: Path, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Every FFN as one expert that is always on, which is the dense FFN, on the paths and kernel of a factored one.

    Raises:
        IntegrityError: a tensor is damaged, missing, unexpected or misshaped.
    """
    dense, reader = read_dense_model(source), CheckpointReader(source)
    spec = FactoredSpec(FactorShape(1, 1, dense.intermediate_size, 0), "softmax", "sum")
    whole = Partition(torch.arange(dense.intermediate_size)[None])
    router_ND = torch.zeros(1, dense.hidden_size)
    layers = [slice_ffn(dense.read_ffn(layer, reader.read), whole, router_ND) for layer in range(dense.num_layers)]
    return assembled(dense, spec, reader, layers, dtype=dtype, device=device)
