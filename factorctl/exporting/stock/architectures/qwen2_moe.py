"""Qwen2-MoE: experts beside a shared expert behind a sigmoid gate, and biases on q, k and v.

llama.cpp's `qwen2moe` never renormalises its gates, so a GGUF becomes another graph.
"""

from __future__ import annotations

from typing import Any

import torch

from factorctl.exporting.engines import SERVERS, SGLANG_HEAD, Engine, Flaw
from factorctl.exporting.stock.architecture import Architecture, Tensors, per_expert, shared_expert
from factorctl.exporting.stock.folding import StockFFN
from factorctl.exporting.stock.padding import StockSizes
from factorctl.models.families import DenseModel


def qwen_config(dense: DenseModel, num_experts: int, sizes: StockSizes) -> dict[str, Any]:
    """What Qwen2-MoE and Qwen3-MoE have in common: experts in every layer, and no window."""
    return {
        "num_experts": num_experts,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "intermediate_size": dense.intermediate_size,
        "moe_intermediate_size": sizes.expert,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": dense.num_layers,
    }


def _config(dense: DenseModel, num_experts: int, sizes: StockSizes) -> dict[str, Any]:
    own = {"shared_expert_intermediate_size": sizes.shared, "qkv_bias": True}
    return qwen_config(dense, num_experts, sizes) | own


def _beside(ffn: StockFFN, layer: str) -> Tensors:
    """A sigmoid gate of zero weights is 1/2; `folding` doubled the down-projection."""
    gate = {f"{layer}mlp.shared_expert_gate.weight": torch.zeros_like(ffn.router_ND[:1])}
    return gate | shared_expert(ffn, f"{layer}mlp.shared_expert.")


ARCHITECTURE = Architecture(
    "qwen2-moe",
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    shared="gated",
    config=_config,
    experts=lambda ffn, layer: per_expert(ffn, f"{layer}mlp."),
    beside=_beside,
    engines=(*SERVERS, Engine.MLX, Engine.OPENVINO, Engine.LLAMA_CPP_CONVERTER),
    flaws=(
        Flaw(
            Engine.MLX,
            lambda served: served.is_sparse,
            "takes no notice of norm_topk_prob: the gates of the chosen experts do not sum to one",
        ),
        Flaw(Engine.MLX, lambda served: served.scales_rope, "refuses rope_scaling", is_silent=False),
        SGLANG_HEAD,
        Flaw(
            Engine.LLAMA_CPP_CONVERTER,
            lambda served: True,
            "makes a file whose gates are not normalised and whose shared expert, its gate being zero, gives NaN",
        ),
    ),
    families=("qwen2",),
    biases="query-key-value",
    always_biased=True,
)
