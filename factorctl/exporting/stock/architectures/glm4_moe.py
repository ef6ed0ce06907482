"""GLM-4-MoE: experts weighed by sigmoids, beside shared experts."""

from __future__ import annotations

from typing import Any

import torch

from factorctl.exporting.engines import MLX_ROPE, SERVERS, Engine, Flaw
from factorctl.exporting.features import features_of
from factorctl.exporting.stock.architecture import Architecture, Tensors, per_expert, shared_expert
from factorctl.exporting.stock.config import rope_keys
from factorctl.exporting.stock.folding import StockFFN
from factorctl.exporting.stock.padding import StockSizes
from factorctl.models.families import DenseModel


def _config(dense: DenseModel, num_experts: int, sizes: StockSizes) -> dict[str, Any]:
    """One group of experts in every layer. It rotates half of each head where nothing else is said."""
    features = features_of(dense)
    return {
        "n_routed_experts": num_experts,
        "num_experts": num_experts,
        "n_shared_experts": sizes.shared // sizes.expert,
        "intermediate_size": dense.intermediate_size,
        "moe_intermediate_size": sizes.expert,
        "first_k_dense_replace": 0,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
        "use_qk_norm": features.qk_norm,
        "attention_bias": features.biases != "none",
        "partial_rotary_factor": 1.0,
        "rope_parameters": {**rope_keys(features)["rope_parameters"], "partial_rotary_factor": 1.0},
    }


def _beside(ffn: StockFFN, layer: str) -> Tensors:
    bias_N = torch.zeros_like(ffn.router_ND[:, 0], dtype=torch.float32)
    correction = {f"{layer}mlp.gate.e_score_correction_bias": bias_N}
    return correction | shared_expert(ffn, f"{layer}mlp.shared_experts.")


ARCHITECTURE = Architecture(
    "glm4-moe",
    "glm4_moe",
    "Glm4MoeForCausalLM",
    shared="own",
    config=_config,
    experts=lambda ffn, layer: per_expert(ffn, f"{layer}mlp."),
    beside=_beside,
    engines=(*SERVERS, Engine.MLX),
    flaws=(
        MLX_ROPE,
        Flaw(
            Engine.MLX,
            lambda served: served.top_k == 1,
            "leaves the gate of a single expert as its sigmoid, where norm_topk_prob makes it one",
        ),
    ),
    biases="query-key-value",
    qk_norm="optional",
    reads_head_dim=True,
    scores="sigmoid",
    counts_shared_experts=True,
    ties_head=False,
)
