"""Making the transformers model that holds factored FFNs: stock classes with their FFN modules exchanged."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from factorctl.errors import IntegrityError, in_one_line
from factorctl.ffn.layer import FactoredFFN
from factorctl.ffn.spec import FactoredSpec
from factorctl.models.domains import Domains
from factorctl.models.families import DenseModel


def empty_dense_model(dense: DenseModel) -> PreTrainedModel:
    """The dense model with parameters on the meta device and real buffers: structure without memory.

    Raises:
        IntegrityError: the fields of the config contradict one another.
    """
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(dense.config, dtype=torch.float32)
    except Exception as error:  # transformers and torch find contradictions anywhere on the way
        raise IntegrityError(
            f"config.json describes no {dense.family.model_type} model that can be built: {in_one_line(error)}",
            "fetch or make the checkpoint again",
        ) from error
    model.eval()
    return model


def empty_factored_model(dense: DenseModel, spec: FactoredSpec) -> PreTrainedModel:
    """The factored model with parameters on the meta device."""
    model = empty_dense_model(dense)
    for layer, block in enumerate(decoder_layers(model)):
        block.mlp = factored_ffn(dense, spec, layer, device="meta")
    if spec.domains is not None:
        names, size = spec.domains.names, dense.hidden_size
        model.model.domains = Domains(
            names, torch.empty(size, device="meta"), torch.empty(len(names), size, device="meta")
        )
    return model


def factored_ffn(
    dense: DenseModel,
    spec: FactoredSpec,
    layer: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> FactoredFFN:
    """An unfilled factored FFN of the sizes, gate and scale that `spec` gives this layer."""
    module = FactoredFFN(
        spec.shape,
        dense.hidden_size,
        dense.activation,
        gate=spec.gate,
        scale_a=spec.scale_a(layer),
        gate_up_bias=dense.has_ffn_bias,
        down_bias=dense.has_ffn_bias,
        dtype=dtype,
        device=device,
    )
    if spec.domains is not None:
        add_domain_experts(module, len(spec.domains.names), spec.domains.top_k, device)
    return module


def add_domain_experts(ffn: FactoredFFN, domains: int, top_k: int, device: torch.device | str | None) -> None:
    """Give a layer room for the ids of every domain's experts, [M, K]; a tensor of the checkpoint."""
    ffn.register_buffer("domain_experts", torch.zeros(domains, top_k, dtype=torch.int32, device=device))


def filled_ffn(
    dense: DenseModel, spec: FactoredSpec, layer: int, tensors: dict[str, torch.Tensor], *, dtype: torch.dtype
) -> FactoredFFN:
    """A factored FFN that holds `tensors`, cast to `dtype` where they are floating point, on their device."""
    module = factored_ffn(dense, spec, layer, device="meta")
    cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    module.load_state_dict(cast, assign=True)
    return module.eval().requires_grad_(False)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, in every family of the table at `model.model.layers`."""
    layers: nn.ModuleList = model.model.layers
    return layers


def factored_ffns(model: PreTrainedModel) -> Iterator[FactoredFFN]:
    """The factored FFNs of a model, from the first layer to the last."""
    for block in decoder_layers(model):
        if isinstance(block.mlp, FactoredFFN):
            yield block.mlp


def stored_choices(model: PreTrainedModel) -> list[torch.Tensor]:
    """By layer, the ids of every domain's experts, [M, K], of a model that chooses by domain."""
    return [ffn.get_buffer("domain_experts") for ffn in factored_ffns(model)]
