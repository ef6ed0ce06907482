"""The sizes of a model that its FLOPs and bytes follow from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from factorctl.config.shape import FactorShape


@dataclass(frozen=True)
class ModelSizes:
    """A decoder-only model with gated FFNs; `shape` with K = N is the dense model."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    shape: FactorShape

    @classmethod
    def of(cls, config: PretrainedConfig, shape: FactorShape) -> ModelSizes:
        heads = int(config.num_attention_heads)
        return cls(
            num_layers=int(config.num_hidden_layers),
            hidden_size=int(config.hidden_size),
            num_heads=heads,
            num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            vocab_size=int(config.vocab_size),
            shape=shape,
        )

    @property
    def dense(self) -> ModelSizes:
        """The same model with every neuron active and no router."""
        return self.with_top_k(self.shape.num_experts)

    @property
    def is_dense(self) -> bool:
        return self.shape.top_k == self.shape.num_experts

    @property
    def routes(self) -> bool:
        return self.shape.routes

    def with_top_k(self, top_k: int) -> ModelSizes:
        return replace(self, shape=replace(self.shape, top_k=top_k))

    @property
    def attention_weights(self) -> int:
        """Weights of the q, k, v and o projections of one layer."""
        return self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)

    @property
    def neuron_weights(self) -> int:
        """Weights of one FFN neuron: a gate row, an up row, a down column."""
        return 3 * self.hidden_size

    @property
    def router_weights(self) -> int:
        return self.hidden_size * self.shape.num_experts if self.routes else 0

    @property
    def head_weights(self) -> int:
        return self.hidden_size * self.vocab_size
