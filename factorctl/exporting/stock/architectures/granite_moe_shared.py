"""GraniteMoeShared: experts beside an MLP that is always on. llama.cpp computes it as `granitemoe`."""

from __future__ import annotations

from typing import Any

import torch

from factorctl.exporting.engines import SERVERS, SGLANG_ROPE, Engine
from factorctl.exporting.features import features_of
from factorctl.exporting.stock.architecture import Architecture, GgufGraph, Tensors, shared_mlp
from factorctl.exporting.stock.folding import StockFFN
from factorctl.exporting.stock.padding import StockSizes
from factorctl.models.families import DenseModel


def config(dense: DenseModel, num_experts: int, sizes: StockSizes) -> dict[str, Any]:
    """Granite's own multipliers are one. trl looks for `num_experts` in every mixture of experts."""
    features = features_of(dense)
    return {
        "num_local_experts": num_experts,
        "num_experts": num_experts,
        "intermediate_size": sizes.expert,
        "shared_intermediate_size": sizes.shared,
        "attention_bias": features.biases != "none",
        "attention_multiplier": features.head_dim**-0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }


def experts(ffn: StockFFN, layer: str) -> Tensors:
    """Router and experts, gate and up joined."""
    return {
        f"{layer}block_sparse_moe.router.layer.weight": ffn.router_ND,
        f"{layer}block_sparse_moe.input_linear.weight": torch.cat([ffn.gate_NHD, ffn.up_NHD], dim=1),
        f"{layer}block_sparse_moe.output_linear.weight": ffn.down_NDH,
    }


def beside(ffn: StockFFN, layer: str) -> Tensors:
    """The MLP that is always on, gate and up joined."""
    gate_SD, up_SD, down_DS = shared_mlp(ffn)
    return {
        f"{layer}shared_mlp.input_linear.weight": torch.cat([gate_SD, up_SD]),
        f"{layer}shared_mlp.output_linear.weight": down_DS,
    }


def _gguf_metadata(dense: DenseModel, sizes: StockSizes) -> dict[str, int | float]:
    return {
        "feed_forward_length": sizes.expert,
        "expert_shared_feed_forward_length": sizes.shared,
        "logit_scale": 1.0,
        "residual_scale": 1.0,
        "embedding_scale": 1.0,
        "attention.scale": features_of(dense).head_dim ** -0.5,
    }


ARCHITECTURE = Architecture(
    "granite-moe-shared",
    "granitemoeshared",
    "GraniteMoeSharedForCausalLM",
    shared="own",
    config=config,
    experts=experts,
    beside=beside,
    block="block_sparse_moe",
    router="router",
    engines=(*SERVERS, Engine.LLAMA_CPP_CONVERTER),
    flaws=(SGLANG_ROPE,),
    gguf=GgufGraph("granitemoe", _gguf_metadata),
)
