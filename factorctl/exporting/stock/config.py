"""config.json of an export: the stock architecture's own fields, with both spellings of what changed between releases.

transformers 5 reads `rope_parameters` and `dtype`; transformers 4, vLLM before mid-2026, SGLang and Ollama read
`rope_theta`, `rope_scaling` and `torch_dtype`, and silently take theta = 10000 where they are missing.
Both are written.
"""

from __future__ import annotations

from typing import Any

import transformers

from factorctl.exporting.features import Features, features_of
from factorctl.exporting.stock.architecture import Architecture
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
        "num_experts_per_tok": spec.shape.top_k,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
        **arch.config(dense, spec.shape.num_experts, sizes),
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
