"""The tensors of a GGUF file: llama.cpp's names, layouts and storage types.

Sources: llama.cpp `conversion/llama.py`, `conversion/granite.py`, `src/models/{llama,granite,qwen3moe}.cpp`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from factorctl.errors import UsageError, did_you_mean
from factorctl.exporting.features import Features, features_of
from factorctl.exporting.gguf.llama_quantizer import ALIASES, MIXED, likely_type
from factorctl.exporting.stock.architecture import GgufGraph, Tensors
from factorctl.exporting.stock.folding import Folding, StockFFN
from factorctl.exporting.stock.tensors import NativeUnits, split_qkv, with_head
from factorctl.models.families import ReadTensor, layer_prefix

QUANTS = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
    "q5_1": GGMLQuantizationType.Q5_1,
    "q5_0": GGMLQuantizationType.Q5_0,
    "q4_1": GGMLQuantizationType.Q4_1,
    "q4_0": GGMLQuantizationType.Q4_0,
}
"""What the `gguf` package can quantise to; `MIXED` has what llama.cpp makes itself."""

PLAIN_QUANTS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f32"}

_REST = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
}
_KEPT_WIDE = ("ffn_gate_inp.weight", "rope_freqs.weight")
"""Stored as float32 whatever `--quant` says, as llama.cpp's converter does: the router decides by small differences."""


def chosen_quant(name: str, stored: torch.dtype) -> str:
    """`--quant` as one of `QUANTS`; `auto` keeps the dtype of the weights.

    Raises:
        UsageError: the type needs more than the weights, with the command that makes it; or there is no such type.
    """
    quant = PLAIN_QUANTS[stored] if name == "auto" else name.lower()
    quant = ALIASES.get(quant, quant)
    if quant in QUANTS or quant in MIXED:
        return quant
    if quant.startswith(("iq", "tq", "mxfp4", "q2_k", "q4_0_")):
        raise UsageError(
            f"--quant {name} takes an importance matrix or a conversion of its own, which are not made here",
            f"did you mean one of {', '.join(MIXED)}? Or export with --quant f16, then run: "
            f"llama-quantize model.gguf model-{name.upper()}.gguf {name.upper()}",
        )
    raise UsageError(f"--quant {name} is no GGUF type", did_you_mean(quant, [*QUANTS, *MIXED]))


@dataclass(frozen=True)
class GgufLayout:
    """The units of a GGUF file, in the dtype of the checkpoint; `storage_type` says what they are stored as."""

    native: NativeUnits
    graph: GgufGraph
    folding: Folding
    untie: bool = False

    @property
    def num_units(self) -> int:
        return self.native.count

    def unit(self, index: int, read: ReadTensor) -> Tensors:
        """llama.cpp's names and tensors of one unit."""
        features = features_of(self.native.dense)
        if index == 0:
            rest = with_head(self.native.rest(read), self.untie)
            return {_REST[name]: self.folding.cast(t) for name, t in rest.items()} | rope_factors(features)
        layer = index - 1
        around = split_qkv(self.native.around_ffn(layer, read), features)
        tensors = {
            f"blk.{layer}.{_renamed(name, layer)}": self.folding.cast(self._rotated(name, tensor, features))
            for name, tensor in around.items()
        }
        return tensors | _experts(self.folding.stock_ffn(layer, self.native.ffn(layer, read)), f"blk.{layer}.")

    def _rotated(self, name: str, tensor: torch.Tensor, features: Features) -> torch.Tensor:
        """q and k with each head's rows interleaved where the graph rotates neighbouring pairs."""
        heads = {"q_proj": features.num_heads, "k_proj": features.num_kv_heads}.get(name.split(".")[-2])
        if heads is None or not self.graph.rotates_neighbours:
            return tensor
        rows = tensor.shape[0] // heads
        return tensor.reshape(heads, 2, rows // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _renamed(name: str, layer: int) -> str:
    stem, _, kind = name.removeprefix(layer_prefix(layer)).rpartition(".")
    return f"{_LAYER[stem]}.{kind}"


def _experts(ffn: StockFFN, prefix: str) -> Tensors:
    tensors = {
        "ffn_gate_inp": ffn.router_ND,
        "ffn_gate_exps": ffn.gate_NHD,
        "ffn_up_exps": ffn.up_NHD,
        "ffn_down_exps": ffn.down_NDH,
        "ffn_gate_shexp": ffn.shared_gate_SD,
        "ffn_up_shexp": ffn.shared_up_SD,
        "ffn_down_shexp": ffn.shared_down_DS,
    }
    return {f"{prefix}{name}.weight": tensor for name, tensor in tensors.items() if tensor is not None}


def rope_factors(features: Features) -> Tensors:
    """Llama 3's frequency scaling as llama.cpp reads it: what each of the head_dim / 2 frequencies is divided by."""
    if features.rope_type != "llama3":
        return {}
    rope = features.rope
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(rope["original_max_position_embeddings"])
    factors = []
    for pair in range(features.head_dim // 2):
        wavelength = 2 * math.pi * features.rope_theta ** (2 * pair / features.head_dim)
        smooth = (context / wavelength - low) / (high - low)
        factors.append(1 / ((1 - min(max(smooth, 0.0), 1.0)) / factor + min(max(smooth, 0.0), 1.0)))
    return {"rope_freqs.weight": torch.tensor(factors, dtype=torch.float32)}


def storage_type(name: str, shape: Sequence[int], quant: str) -> GGMLQuantizationType:
    """What a tensor is stored as: vectors and routers wide; rows that are no whole number of blocks as f16.

    In a mixed type it is what most tensors of its kind become.
    """
    if quant in MIXED:
        return likely_type(name, shape, quant)
    if len(shape) == 1 or name.endswith(_KEPT_WIDE):
        return GGMLQuantizationType.F32
    wanted = QUANTS[quant]
    return wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else GGMLQuantizationType.F16


def stored_bytes(shape: Sequence[int], kind: GGMLQuantizationType) -> int:
    """Bytes of a tensor stored as `kind`."""
    block, size = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size


def to_numpy(tensor: torch.Tensor) -> Any:
    """The values as a float32 numpy array, which every float type up to 32 bits fits into."""
    return tensor.to(torch.float32).contiguous().numpy()
