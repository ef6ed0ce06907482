"""The dense families that can be factored, and how each stores its FFN. One row per family.

A family is here when its FFN is gated (two input projections, an elementwise activation, one output projection),
lies at `model.layers.L.mlp`, and nothing else in the layer looks inside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig

from factorctl.checkpoint.sources import read_dense_config
from factorctl.contracts import DenseFFN
from factorctl.errors import IntegrityError, UsageError, in_one_line

ReadTensor = Callable[[str], torch.Tensor]

ACTIVATIONS = frozenset(
    {"silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "relu2", "quick_gelu"}
)
"""Elementwise activations: each neuron's output depends on that neuron alone, so any partition is exact."""


@dataclass(frozen=True)
class Family:
    """How one transformers model type stores its gated FFN."""

    model_type: str
    title: str
    fused_gate_up: bool = False
    """One tensor `gate_up_proj` [2F, D], gate rows first (Phi-3), instead of `gate_proj` and `up_proj`."""
    activation_key: str = "hidden_act"
    post_ffn_norm: bool = False
    """The FFN's output passes `post_feedforward_layernorm` before it joins the residual stream (Gemma 2, 3)."""

    def ffn_tensor_names(self, layer: int, *, gate_up_bias: bool, down_bias: bool) -> dict[str, str]:
        """Role -> tensor name, for the tensors that the FFN of this layer has."""
        prefix = f"{ffn_prefix(layer)}."
        roles = {"gate_up": "gate_up_proj"} if self.fused_gate_up else {"gate": "gate_proj", "up": "up_proj"}
        names = {role: f"{prefix}{stem}.weight" for role, stem in {**roles, "down": "down_proj"}.items()}
        if gate_up_bias:
            names |= {f"{role}_bias": f"{prefix}{stem}.bias" for role, stem in roles.items()}
        if down_bias:
            names["down_bias"] = f"{prefix}down_proj.bias"
        return names


def ffn_prefix(layer: int) -> str:
    """Name of the FFN module in every family, dense or factored."""
    return f"model.layers.{layer}.mlp"


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "Llama 1/2/3, TinyLlama, MobileLLaMA, SmolLM2"),
        Family("mistral", "Mistral"),
        Family("qwen2", "Qwen2, Qwen2.5"),
        Family("qwen3", "Qwen3"),
        Family("phi3", "Phi-3", fused_gate_up=True),
        Family("gemma", "Gemma"),
        Family("gemma2", "Gemma 2", activation_key="hidden_activation", post_ffn_norm=True),
        Family("gemma3_text", "Gemma 3 text", activation_key="hidden_activation", post_ffn_norm=True),
    )
}


@dataclass(frozen=True)
class DenseModel:
    """A dense model's configuration, checked to be one that can be factored."""

    family: Family
    config: PretrainedConfig
    raw: Mapping[str, object]
    """config.json as it stands in the source."""

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def intermediate_size(self) -> int:
        return int(self.config.intermediate_size)

    @property
    def context(self) -> int | None:
        """The longest text that the model was made for; None where its configuration sets no limit."""
        limit = getattr(self.config, "max_position_embeddings", None)
        return None if limit is None else int(limit)

    @property
    def activation(self) -> str:
        return activation_of(self.family, self.config)

    @property
    def has_ffn_bias(self) -> bool:
        return bool(getattr(self.config, "mlp_bias", False))

    def ffn_tensor_names(self, layer: int) -> dict[str, str]:
        return self.family.ffn_tensor_names(layer, gate_up_bias=self.has_ffn_bias, down_bias=self.has_ffn_bias)

    def read_ffn(self, layer: int, read: ReadTensor) -> DenseFFN:
        """The FFN weights of one layer, in the dtype on disk.

        Raises:
            IntegrityError: a tensor has another shape than the config says.
        """
        tensors = {role: read(name) for role, name in self.ffn_tensor_names(layer).items()}
        if self.family.fused_gate_up:
            tensors["gate"], tensors["up"] = tensors.pop("gate_up").chunk(2)
            if self.has_ffn_bias:
                tensors["gate_bias"], tensors["up_bias"] = tensors.pop("gate_up_bias").chunk(2)
        f, d = self.intermediate_size, self.hidden_size
        expected = {"gate": (f, d), "up": (f, d), "down": (d, f), "gate_bias": (f,), "up_bias": (f,), "down_bias": (d,)}
        for role, tensor in tensors.items():
            if tuple(tensor.shape) != expected[role]:
                raise IntegrityError(
                    f"layer {layer}: {role} has shape {tuple(tensor.shape)}; the config says {expected[role]}"
                )
        return DenseFFN(
            gate_FD=tensors["gate"],
            up_FD=tensors["up"],
            down_DF=tensors["down"],
            gate_bias_F=tensors.get("gate_bias"),
            up_bias_F=tensors.get("up_bias"),
            down_bias_D=tensors.get("down_bias"),
        )


def activation_of(family: Family, config: PretrainedConfig) -> str:
    """Name of the FFN's activation, refusing what is not elementwise.

    Raises:
        UsageError: naming the activation and those that can be split.
    """
    name = getattr(config, family.activation_key, None) or getattr(config, "hidden_act", None)
    if name not in ACTIVATIONS:
        raise UsageError(
            f"activation {name!r} cannot be split into experts exactly", f"supported: {', '.join(sorted(ACTIVATIONS))}"
        )
    return str(name)


def read_dense_model(directory: Path) -> DenseModel:
    """The dense model that a Hugging Face directory describes.

    Raises:
        UsageError: the architecture is not in the table, with the reason and the list.
    """
    raw = read_dense_config(directory)
    return dense_model(raw, origin=str(directory))


def dense_model(raw: Mapping[str, object], *, origin: str) -> DenseModel:
    """As `read_dense_model`, from the content of a config.json."""
    if "model_type" not in raw:
        raise UsageError(f"the config.json of {origin} names no model_type", _known_families())
    model_type = str(raw["model_type"])
    if model_type not in FAMILIES:
        hint = "give the dense model it was made from: `factorctl inspect` names it"
        raise UsageError(
            f"{origin} is a {model_type!r} model, {_why_not(model_type)}",
            hint if model_type == "factorctl" else _known_families(),
        )
    _check_sizes(raw, origin)
    settings = {key: value for key, value in raw.items() if key != "model_type"}
    try:
        config = AutoConfig.for_model(model_type, **settings)
    except Exception as error:  # transformers checks configs with many exception types of its own
        raise IntegrityError(
            f"{origin}: config.json does not describe a {model_type} model: {in_one_line(error)}"
        ) from error
    model = DenseModel(FAMILIES[model_type], config, raw)
    activation_of(model.family, config)
    return model


LARGEST: Mapping[str, int] = {
    "num_hidden_layers": 1024,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "vocab_size": 2**28,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**14,
    "max_position_embeddings": 2**40,
}
"""Far beyond any model there is: a larger number is damage, and would only cost memory and time to find out."""
_MAY_BE_NULL = frozenset({"num_key_value_heads", "head_dim"})


def _check_sizes(raw: Mapping[str, object], origin: str) -> None:
    for field, largest in LARGEST.items():
        value = raw.get(field, 1)
        if value is None and field in _MAY_BE_NULL:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
            shown = str(value) if not isinstance(value, int) or value.bit_length() < 100 else "a huge number"
            raise IntegrityError(f"{origin}: config.json gives {field} = {shown[:80]!r}; it must be 1 to {largest}")


def _why_not(model_type: str) -> str:
    if "moe" in model_type or model_type in {"mixtral", "deepseek_v2", "deepseek_v3", "olmoe", "dbrx"}:
        return "which already is a mixture of experts"
    if model_type == "factorctl":
        return "a factored checkpoint already"
    if model_type in {"gpt2", "gpt_neox", "opt", "bloom", "falcon", "phi", "gptj"}:
        return "whose FFN has no gate"
    if f"{model_type}_text" in FAMILIES:
        return f"which sees images too; only its text half, a {model_type}_text checkpoint, can be factored"
    return "which is not in the table of families"


def _known_families() -> str:
    return "supported: " + "; ".join(f"{family.model_type} ({family.title})" for family in FAMILIES.values())
