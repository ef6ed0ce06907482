"""Mixtral: experts alone. llama.cpp computes it as `llama`."""

from __future__ import annotations

from typing import Any

from factorctl.exporting.engines import (
    MISTRAL_RS_ROPE,
    MLX_ROPE,
    MLX_WINDOW,
    SERVERS,
    SGLANG_HEAD,
    SGLANG_ROPE,
    Engine,
    Flaw,
)
from factorctl.exporting.features import features_of
from factorctl.exporting.stock.architecture import Architecture, GgufGraph, Tensors, per_expert
from factorctl.exporting.stock.folding import StockFFN
from factorctl.exporting.stock.padding import StockSizes
from factorctl.models.families import DenseModel


def _config(dense: DenseModel, num_experts: int, sizes: StockSizes) -> dict[str, Any]:
    return {
        "num_local_experts": num_experts,
        "intermediate_size": sizes.expert,
        "sliding_window": features_of(dense).window,
    }


def _experts(ffn: StockFFN, layer: str) -> Tensors:
    return per_expert(ffn, f"{layer}block_sparse_moe.", gate="w1", up="w3", down="w2")


ARCHITECTURE = Architecture(
    "mixtral",
    "mixtral",
    "MixtralForCausalLM",
    shared="none",
    config=_config,
    experts=_experts,
    engines=(*SERVERS, Engine.MLX, Engine.OPENVINO, Engine.MISTRAL_RS, Engine.OLLAMA, Engine.LLAMA_CPP_CONVERTER),
    flaws=(
        MLX_ROPE,
        MLX_WINDOW,
        MISTRAL_RS_ROPE,
        SGLANG_ROPE,
        SGLANG_HEAD,
        Flaw(Engine.OLLAMA, lambda served: True, "exchanges two of Mixtral's expert matrices"),
    ),
    gguf=GgufGraph("llama", metadata=lambda dense, sizes: {"feed_forward_length": sizes.expert}),
    reads_head_dim=True,
    has_window=True,
)
