"""A GGUF file read back as the native model: hyperparameters, and tensors dequantised under their native names.

Written against llama.cpp's graphs, not against the code that writes the file: what either of the two has wrong does not
cancel. Both take from the architecture's file how its graph rotates and where shared neurons lie. Beside each value
goes how far storing it may have moved it.

N num_experts, H expert_size, S shared_size, D hidden_size, F = S + N*H.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUFReader
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from factorctl.checkpoint.reader import CheckpointReader
from factorctl.errors import FactorctlError
from factorctl.exporting.features import Features, features_of
from factorctl.exporting.stock.choice import gguf_architecture, graph_of
from factorctl.exporting.stock.folding import folded_scale
from factorctl.exporting.stock.padding import StockSizes
from factorctl.ffn.spec import FactoredSpec
from factorctl.models.families import DenseModel, ffn_prefix, layer_prefix

Leaf = Callable[[str], torch.Tensor]
"""From a name in the file to a tensor of that shape: its values, or how far they may be off."""

FLOAT_STEPS = {"F32": 2.0**-22, "F16": 2.0**-10, "BF16": 2.0**-7}
"""Of a value, what one step of the last bit is at most."""
SMALLEST = {"F32": 1e-37, "F16": 2.0**-24, "BF16": 1e-37}
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
REST = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


class GgufValueError(FactorctlError):
    """The file does not hold the native model's values: nothing may be published."""


class GgufValues:
    """The tensors of one file under their native names."""

    def __init__(
        self, path: Path, dense: DenseModel, spec: FactoredSpec, native: CheckpointReader, shifts: tuple[int, ...] = ()
    ) -> None:
        self.dense, self.spec, self.native, self.shifts = dense, spec, native, shifts
        reader = GGUFReader(path)
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.arch = gguf_architecture(dense, spec)
        self.graph = graph_of(self.arch)

    def read(self, name: str) -> torch.Tensor:
        """The value in the file, a hard gate's router as it is there.

        What no file holds (neuron ids, the router of K = N) is the checkpoint's own.
        """
        return self._native(name, self._values)

    def check(self) -> None:
        """Hold every hyperparameter and every value against the checkpoint's.

        Raises:
            GgufValueError: one is another, or off by more than a step of what it is stored as.
        """
        for key, wanted_value in self._hyperparameters().items():
            found = self.fields.get(f"{self.graph.name}.{key}")
            if found is None or abs(float(found) - wanted_value) > 1e-6 * abs(wanted_value):
                raise GgufValueError(
                    f"the file says {self.graph.name}.{key} = {found}; the model has {wanted_value}",
                    "nothing was published",
                )
        self._check_frequencies()
        for layer in range(self.dense.num_layers):
            self._check_padding(layer)
        for name in self.native.entries:
            wanted = self._shifted(name, self.native.read(name))
            off = (self._native(name, self._values).double() - wanted.double()).abs()
            strays = off > self._native(name, self._steps).double() + 1e-6 * wanted.double().abs()
            if bool(strays.any()):
                raise GgufValueError(
                    f"the file does not hold tensor {name}: {int(strays.sum())} of {strays.numel()} values are off by "
                    "more than a step of their type",
                    "nothing was published; this is a fault of factorctl: please report it",
                )
        for layer in range(self.dense.num_layers):
            self._check_copies(layer)

    def _hyperparameters(self) -> dict[str, float]:
        """What a graph computes otherwise if it is told another number, from the dense config and the shape."""
        config, shape = self.dense.config, self.spec.shape
        rope, size = config.rope_parameters, features_of(self.dense).head_dim
        wanted = {
            "rope.freq_base": rope["rope_theta"],
            "rope.dimension_count": size,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.key_length": size,
            "expert_count": shape.num_experts,
            "expert_used_count": shape.top_k,
        }
        if rope["rope_type"] == "linear":
            wanted["rope.scaling.factor"] = rope["factor"]
        wanted |= self.graph.metadata(self.dense, self._sizes())
        neutral = {"attention.scale": size**-0.5, "logit_scale": 1, "residual_scale": 1, "embedding_scale": 1}
        wanted |= {key: value for key, value in neutral.items() if key in wanted}
        return {key: float(value) for key, value in wanted.items()}

    def _sizes(self) -> StockSizes:
        """Neurons of an expert and of the shared MLP, as the file's own tensors have them."""
        expert, shared = (f"blk.0.ffn_up_{kind}.weight" for kind in ("exps", "shexp"))
        has_shared = shared in self.tensors
        return StockSizes(_shape(self._tensor(expert))[-2], _shape(self._tensor(shared))[-2] if has_shared else 0)

    def _check_frequencies(self) -> None:
        """llama3's scaling of RoPE as transformers computes it, against the divisors in the file."""
        config = self.dense.config
        if config.rope_parameters["rope_type"] != "llama3":
            return
        theta, size = config.rope_parameters["rope_theta"], features_of(self.dense).head_dim
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        unscaled = theta ** -(torch.arange(0, size, 2).double() / size)
        if not torch.allclose(unscaled / self._values("rope_freqs.weight"), scaled.double(), rtol=1e-5):
            raise GgufValueError("the file's rope_freqs.weight are not the model's", "nothing was published")

    def _check_padding(self, layer: int) -> None:
        """Neurons behind an expert's own and behind the shared ones give zero, whatever their down-projection.

        Zero there is not in every type's reach, where a block holds neurons of both kinds; a row of zeros always is.
        """
        shape, copied = self.spec.shape, self.arch.shared == "copied"
        own = {"exps": shape.expert_size + (shape.shared_size if copied else 0)}
        if shape.shared_size and not copied:
            own["shexp"] = shape.shared_size
        for kind, size in own.items():
            name = f"blk.{layer}.ffn_up_{kind}.weight"
            if _shape(self._tensor(name))[-2] > size and bool(self._values(name)[..., size:, :].any()):
                raise GgufValueError(f"the padding in tensor {name} is not zero", "nothing was published")

    def _check_copies(self, layer: int) -> None:
        """Shared neurons that are copied into every expert are the same in all of them."""
        size = self.spec.shape.shared_size
        if self.arch.shared != "copied" or not size:
            return
        for kind, dim in (("gate", 1), ("up", 1), ("down", 2)):
            name = f"blk.{layer}.ffn_{kind}_exps.weight"
            values, steps = (leaf(name).narrow(dim, 0, size).double() for leaf in (self._values, self._steps))
            if bool(((values - values[:1]).abs() > steps + steps[:1]).any()):
                raise GgufValueError(
                    f"tensor {name} holds other shared neurons in each expert", "nothing was published"
                )

    def _shifted(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A router as a hard gate's stand-in has it: divided by its layer's power of two."""
        if not (self.shifts and name.endswith(".mlp.router")):
            return tensor
        return tensor.double() * 2.0 ** -self.shifts[int(name.split(".")[2])]

    def _native(self, name: str, leaf: Leaf) -> torch.Tensor:
        if name in REST:
            return leaf(REST[name])
        if name == "lm_head.weight":
            return leaf("output.weight")
        layer = int(name.split(".")[2])
        block = f"blk.{layer}."
        if name.startswith(f"{ffn_prefix(layer)}."):
            return self._ffn(name.removeprefix(f"{ffn_prefix(layer)}."), name, layer, block, leaf)
        stem, _, kind = name.removeprefix(layer_prefix(layer)).rpartition(".")
        if stem == "self_attn.qkv_proj":
            parts = (self._attention(f"self_attn.{letter}_proj", kind, block, leaf) for letter in "qkv")
            return torch.cat(list(parts))
        return self._attention(stem, kind, block, leaf)

    def _attention(self, stem: str, kind: str, block: str, leaf: Leaf) -> torch.Tensor:
        if stem not in ("self_attn.q_proj", "self_attn.k_proj"):
            return leaf(f"{block}{NAMES[stem]}.{kind}")
        features, letter = features_of(self.dense), stem[len("self_attn.")]
        stored = leaf(f"{block}attn_{letter}.{kind}")
        return stored[_halves(features, letter)] if self.graph.rotates_neighbours else stored

    def _ffn(self, part: str, name: str, layer: int, block: str, leaf: Leaf) -> torch.Tensor:
        """One parameter of `FactoredFFN`. Shared neurons stand apart, or before each expert's own."""
        shape = self.spec.shape
        s, copied = shape.shared_size, self.arch.shared == "copied"
        start = s if copied else 0
        own = slice(start, start + shape.expert_size)  # what lies behind is padding
        if part == "router" and shape.top_k < shape.num_experts:
            return leaf(f"{block}ffn_gate_inp.weight")
        if part == "gate_up":
            return torch.cat([leaf(f"{block}ffn_{kind}_exps.weight")[:, own] for kind in ("gate", "up")], dim=1)
        if part == "shared_gate_up":
            parts = [f"{block}ffn_{kind}_{'exps' if copied else 'shexp'}.weight" for kind in ("gate", "up")]
            return torch.cat([leaf(part)[0, :s] if copied else leaf(part)[:s] for part in parts])
        if part == "down":
            down_NDH, scale = leaf(f"{block}ffn_down_exps.weight"), folded_scale(self.spec, layer)
            routed_DR = (down_NDH[:, :, own] / scale).transpose(0, 1).flatten(1)
            if not s:
                return routed_DR
            shared_DS = down_NDH[0, :, :s] if copied else leaf(f"{block}ffn_down_shexp.weight")[:, :s]
            return torch.cat([shared_DS, routed_DR], dim=1)
        # What no file holds: neuron ids, and the router of K = N, which native models do not ask.
        own_value = self.native.read(name)
        return own_value if leaf == self._values else torch.zeros_like(own_value)

    def _values(self, name: str) -> torch.Tensor:
        tensor = self._tensor(name)
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(_shape(tensor))
        return torch.from_numpy(np.array(values, dtype=np.float32))

    def _steps(self, name: str) -> torch.Tensor:
        """How far storing a value may have moved it: a step of its block, which spans twice its largest magnitude."""
        kind, values = self._tensor(name).tensor_type, self._values(name)
        if kind.name in FLOAT_STEPS:
            return values.abs() * FLOAT_STEPS[kind.name] + SMALLEST[kind.name]
        block, bits = GGML_QUANT_SIZES[kind][0], int(kind.name.lstrip("IT")[1])
        largest = values.abs().unflatten(-1, (-1, block)).amax(-1, keepdim=True)
        step: torch.Tensor = largest * (2.0 / 2**bits) * 1.1
        return step.expand(*largest.shape[:-1], block).flatten(-2)

    def _tensor(self, name: str) -> Any:
        if name not in self.tensors:
            raise GgufValueError(f"the file lacks tensor {name}", "nothing was published")
        return self.tensors[name]


def _shape(tensor: Any) -> list[int]:
    """GGUF names the innermost dimension first."""
    return [int(size) for size in reversed(tensor.shape)]


def _halves(features: Features, letter: str) -> torch.Tensor:
    """Where each native row of q or k lies: llama.cpp rotates neighbours, transformers rows half a head apart."""
    heads = features.num_heads if letter == "q" else features.num_kv_heads
    rows = torch.arange(heads * features.head_dim).view(heads, features.head_dim // 2, 2)
    return rows.transpose(1, 2).flatten()
