"""Dense FFNs cut in other ways, built in memory: the models behind controls that do not use the checkpoint's experts.

Everything is read from the dense source layer by layer, factored by the same `LayerFactory` as `factorize` uses, and
put together as one model; nothing is written.

D hidden_size, F intermediate_size, A active neurons, N num_experts, K top_k, H expert_size.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from factorctl.calibration.compressed_stream import CalibrationStream
from factorctl.calibration.layer_fit import LayerFit
from factorctl.calibration.stream import LayerwiseModel
from factorctl.checkpoint.reader import CheckpointReader
from factorctl.config.shape import MAX_EXPERTS, FactorShape
from factorctl.contracts import Stat
from factorctl.ffn.slicing import FactoredTensors
from factorctl.ffn.spec import FactoredSpec
from factorctl.models.assembling import assembled
from factorctl.models.families import DenseModel, read_dense_model
from factorctl.partitions import get_strategy
from factorctl.pipeline.factorize.layers import LayerFactory
from factorctl.progress import Progress

MOEFICATION_EXPERT_SIZE = 32
"""Neurons of an expert in MoEfication (arXiv 2110.01786)."""


def static_model(
    source: Path,
    active_neurons: int,
    ids_BL: torch.Tensor,
    *,
    refit: bool,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
) -> PreTrainedModel:
    """Every FFN cut down to its `active_neurons` most important neurons, with or without the refit of W_down.

    Importance is measured, and W_down fitted, on the calibration tokens, as `factorize --top-k 0 --refit` does.
    """
    dense, reader = read_dense_model(source), CheckpointReader(source)
    left_out = dense.intermediate_size - active_neurons
    spec = FactoredSpec(FactorShape(1, 0, left_out, active_neurons), "softmax", "sum")
    strategy, _ = get_strategy("contiguous")
    stream = CalibrationStream(LayerwiseModel(dense, reader, ids_BL, device), compressed=refit)
    needs = frozenset({Stat.IMPORTANCE})
    factory = LayerFactory(dense, spec, strategy, reader, needs, fit=LayerFit(refit=refit), stream=stream)
    title = "Pruning by importance, with refit" if refit else "Pruning by importance"
    tensors = _factored_layers(factory, dense, title, progress)
    return assembled(dense, spec, reader, tensors, dtype=dtype, device=device)


def moefication_model(
    source: Path, active_neurons: int, *, seed: int, dtype: torch.dtype, device: torch.device, progress: Progress
) -> tuple[PreTrainedModel, FactorShape]:
    """MoEfication's split without training: balanced k-means on gate rows, experts of about 32 neurons.

    Experts are chosen by the similarity of the input to the experts' centres (the mean of their gate rows, at length
    one), the paper's selection that needs no training; its trained MLP selection is not used. Chosen experts count
    fully: gate `hard`, a = 1.
    """
    dense, reader = read_dense_model(source), CheckpointReader(source)
    shape = fine_shape(dense.intermediate_size, active_neurons, MOEFICATION_EXPERT_SIZE)
    spec = FactoredSpec(shape, "hard", "sum")
    strategy, _ = get_strategy("clustered")
    factory = LayerFactory(dense, spec, strategy, reader, frozenset(), seed)
    tensors = _factored_layers(factory, dense, "Clustering for MoEfication", progress)
    for layer in tensors:
        centres_ND = layer["gate_up"][:, : shape.expert_size].float().mean(1)
        layer["router"] = F.normalize(centres_ND, dim=1).to(layer["router"].dtype)
    return assembled(dense, spec, reader, tensors, dtype=dtype, device=device), shape


def fine_shape(intermediate_size: int, active_neurons: int, expert_size: int) -> FactorShape:
    """Equal experts without shared neurons, K of which hold exactly `active_neurons`.

    H must divide both F and A, and at most 128 experts are made; of what is left the nearest to `expert_size` is taken.
    """
    both = math.gcd(intermediate_size, active_neurons)
    sizes = [h for h in range(1, both + 1) if both % h == 0 and intermediate_size // h <= MAX_EXPERTS] or [both]
    size = min(sizes, key=lambda h: (abs(math.log(h / expert_size)), h))
    return FactorShape(intermediate_size // size, active_neurons // size, size, 0)


def _factored_layers(factory: LayerFactory, dense: DenseModel, title: str, progress: Progress) -> list[FactoredTensors]:
    layers = []
    with progress.stage(title, total=dense.num_layers, unit="layers") as task:
        for layer in range(dense.num_layers):
            layers.append(factory.factor(layer).tensors)
            task.advance(layer=layer)
    return layers
