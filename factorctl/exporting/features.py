"""What a dense model's attention and FFN ask of an engine, read from its config: the fields that targets differ on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from factorctl.models.families import DenseModel

Biases = Literal["none", "query-key-value", "query-key-value-output"]
"""Which attention projections have biases."""


@dataclass(frozen=True)
class Features:
    """The properties of a dense model that some stock architecture or engine cannot hold."""

    activation: str
    ffn_bias: bool
    biases: Biases
    """Qwen2 has them built in, on q, k and v; with `attention_bias` all four projections have them."""
    qk_norm: bool
    """Whether each head's queries and keys are normalised (Qwen3)."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    usual_head_dim: int
    """hidden_size / num_attention_heads: what engines assume that read no `head_dim`."""
    rope: Mapping[str, Any]
    """Flat RoPE parameters: rope_type, rope_theta and what the type needs."""
    partial_rotary_factor: float
    context_length: int
    window: int | None
    """Sliding window in tokens, where it is shorter than the context and holds in some layer."""
    window_everywhere: bool

    @property
    def rope_type(self) -> str:
        return str(self.rope.get("rope_type", "default"))

    @property
    def rope_theta(self) -> float:
        return float(self.rope["rope_theta"])


def features_of(dense: DenseModel) -> Features:
    """Read the features of a dense model's config."""
    config = dense.config
    heads = int(config.num_attention_heads)
    usual = dense.hidden_size // heads
    rope = dict(getattr(config, "rope_parameters", None) or {})
    window, everywhere = _window(config)
    return Features(
        activation="silu" if dense.activation == "swish" else dense.activation,
        ffn_bias=dense.has_ffn_bias,
        biases=_biases(dense),
        qk_norm=dense.family.model_type == "qwen3",
        num_heads=heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or usual),
        usual_head_dim=usual,
        rope=rope,
        partial_rotary_factor=float(rope.get("partial_rotary_factor") or 1.0),
        context_length=int(config.max_position_embeddings),
        window=window,
        window_everywhere=everywhere,
    )


def _biases(dense: DenseModel) -> Biases:
    if getattr(dense.config, "attention_bias", False):
        return "query-key-value-output"
    return "query-key-value" if dense.family.model_type == "qwen2" else "none"


def _window(config: Any) -> tuple[int | None, bool]:
    """(window, whether every layer has it); a window as long as the context is none."""
    window = getattr(config, "sliding_window", None)
    if not window or window >= config.max_position_embeddings:
        return None, False
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    sliding = [kind == "sliding_attention" for kind in kinds]
    return (int(window), all(sliding)) if any(sliding) else (None, False)
