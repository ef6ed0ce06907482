"""Qwen3-MoE: experts alone, which share neurons as copies, and norms of queries and keys."""

from __future__ import annotations

from typing import Any

from factorctl.exporting.engines import MISTRAL_RS_ROPE, MLX_ROPE, SERVERS, SGLANG_HEAD, Engine
from factorctl.exporting.stock.architecture import Architecture, GgufGraph, per_expert
from factorctl.exporting.stock.architectures.qwen2_moe import qwen_config
from factorctl.exporting.stock.padding import StockSizes
from factorctl.models.families import DenseModel


def _config(dense: DenseModel, num_experts: int, sizes: StockSizes) -> dict[str, Any]:
    return {**qwen_config(dense, num_experts, sizes), "attention_bias": False}


def _gguf_metadata(dense: DenseModel, sizes: StockSizes) -> dict[str, int | float]:
    return {"feed_forward_length": dense.intermediate_size, "expert_feed_forward_length": sizes.expert}


ARCHITECTURE = Architecture(
    "qwen3-moe",
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    shared="copied",
    config=_config,
    experts=lambda ffn, layer: per_expert(ffn, f"{layer}mlp."),
    engines=(*SERVERS, Engine.MLX, Engine.OPENVINO, Engine.MISTRAL_RS, Engine.LLAMA_CPP_CONVERTER),
    flaws=(MLX_ROPE, MISTRAL_RS_ROPE, SGLANG_HEAD),
    families=("qwen3",),
    gguf=GgufGraph(
        "qwen3moe", _gguf_metadata, rotates_neighbours=False, biases="query-key-value", reads_rope_factors=False
    ),
    qk_norm="always",
    reads_head_dim=True,
)
