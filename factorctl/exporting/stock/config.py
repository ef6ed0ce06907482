"""config.json of an export: the stock architecture's own fields, with both spellings of what changed between releases.

transformers 5 reads `rope_parameters` and `dtype`; transformers 4, vLLM before mid-2026, SGLang and Ollama read
`rope_theta`, `rope_scaling` and `torch_dtype`, and silently take theta = 10000 where they are missing.
Both are written.
"""

from __future__ import annotations

from typing import Any

import transformers

from factorctl.exporting.features import Features, features_of
from factorctl.exporting.stock.architectures import GLM4, HYBRID, MIXTRAL, QWEN2, Architecture
from factorctl.exporting.stock.padding import StockSizes
from factorctl.ffn.spec import FactoredSpec
from factorctl.models.families import DenseModel


def stock_config(
    dense: DenseModel, spec: FactoredSpec, arch: Architecture, sizes: StockSizes, *, dtype: str, tied: bool
) -> dict[str, Any]:
    """config.json for `arch`.

    Args:
        sizes: neurons of an expert and of the shared MLP.
        dtype: of the stored weights, e.g. 'bfloat16'.
        tied: whether the head is the embedding.
    """
    features = features_of(dense)
    return {
        **_common(dense, features, arch, dtype=dtype, tied=tied),
        **rope_keys(features),
        **_partial_rotary(arch, features),
        "num_experts_per_tok": spec.shape.top_k,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
        **_experts(dense, spec, features, arch, sizes),
    }


def _common(dense: DenseModel, features: Features, arch: Architecture, *, dtype: str, tied: bool) -> dict[str, Any]:
    config = dense.config
    return {
        "architectures": [arch.class_name],
        "model_type": arch.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": dense.hidden_size,
        "num_hidden_layers": dense.num_layers,
        "num_attention_heads": features.num_heads,
        "num_key_value_heads": features.num_kv_heads,
        "head_dim": features.head_dim,
        "hidden_act": features.activation,
        "max_position_embeddings": features.context_length,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "attention_dropout": config.attention_dropout,
        "tie_word_embeddings": tied,
        "use_cache": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "dtype": dtype,
        "torch_dtype": dtype,
        "transformers_version": transformers.__version__,
    }


def rope_keys(features: Features) -> dict[str, Any]:
    """RoPE under the keys of transformers 5 and under those of everyone before."""
    parameters = {key: value for key, value in features.rope.items() if key != "partial_rotary_factor"}
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    return {
        "rope_parameters": parameters,
        "rope_theta": features.rope_theta,
        "rope_scaling": None if features.rope_type == "default" else scaling,
    }


def _partial_rotary(arch: Architecture, features: Features) -> dict[str, Any]:
    """GLM-4-MoE rotates half of each head where nothing else is said."""
    if arch is not GLM4:
        return {}
    parameters = {**rope_keys(features)["rope_parameters"], "partial_rotary_factor": 1.0}
    return {"partial_rotary_factor": 1.0, "rope_parameters": parameters}


def _experts(
    dense: DenseModel, spec: FactoredSpec, features: Features, arch: Architecture, sizes: StockSizes
) -> dict[str, Any]:
    """Experts, router and what attention has of its own. trl looks for `num_experts` in every mixture of experts."""
    num_experts = spec.shape.num_experts
    if arch is MIXTRAL:
        return {
            "num_local_experts": num_experts,
            "intermediate_size": sizes.expert,
            "sliding_window": features.window,
        }
    if arch.is_granite:
        return _granite(num_experts, features, sizes) | (_no_mamba(dense, features) if arch is HYBRID else {})
    if arch is GLM4:
        return _glm4(dense, num_experts, features, sizes)
    qwen: dict[str, Any] = {
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
    if arch is QWEN2:
        return {**qwen, "shared_expert_intermediate_size": sizes.shared, "qkv_bias": True}
    return {**qwen, "attention_bias": False}


def _granite(num_experts: int, features: Features, sizes: StockSizes) -> dict[str, Any]:
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


def _no_mamba(dense: DenseModel, features: Features) -> dict[str, Any]:
    """GraniteMoeHybrid of attention layers alone. The mamba fields describe a layer that is nowhere; they are small,
    since engines plan their cache by them, and consistent, since configs are checked."""
    return {
        "layer_types": ["attention"] * dense.num_layers,
        "position_embedding_type": "rope",
        "mamba_expand": 1,
        "mamba_n_heads": features.num_heads,
        "mamba_d_head": dense.hidden_size // features.num_heads,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_chunk_size": 256,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
    }


def _glm4(dense: DenseModel, num_experts: int, features: Features, sizes: StockSizes) -> dict[str, Any]:
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
    }
