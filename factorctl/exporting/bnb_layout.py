"""`--to bnb-4bit` and `--to bnb-8bit`: a dense form whose linear layers are stored as bitsandbytes quantises them.

Every projection of attention and FFN is quantised; embeddings, norms and head keep their dtype, as transformers' own
switch keeps them. That switch replaces `nn.Linear` and nothing else, while transformers 5 holds the experts of every
mixture-of-experts language model as fused parameters; so this target takes what has no routed experts: all experts on
(K = N), or shared neurons alone (K = 0). For routed experts in few bits there is GGUF.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from factorctl.exporting.dense_layout import DenseLayout
from factorctl.exporting.stock_tensors import Tensors
from factorctl.models.families import ReadTensor

Bits = Literal[4, 8]
BLOCK_SIZE = 64
"""Weights that share one scale in 4 bits."""
QUANT_STATE_BYTES = 100
"""About what the JSON beside each 4-bit weight takes."""


@dataclass(frozen=True)
class BnbLayout:
    """The units of a dense checkpoint, linear layers quantised."""

    dense: DenseLayout
    bits: Bits

    @property
    def num_units(self) -> int:
        return self.dense.num_units

    def unit(self, index: int, read: ReadTensor) -> Tensors:
        tensors: Tensors = {}
        for name, tensor in self.dense.unit(index, read).items():
            if not _is_linear(name):
                tensors[name] = tensor
            elif tensor.is_meta:
                tensors |= _planned(name, tensor, self.bits)
            else:
                tensors |= _in_4_bits(name, tensor) if self.bits == 4 else _in_8_bits(name, tensor)
        return tensors


def quantization_config(bits: Bits, dtype: str) -> dict[str, Any]:
    """What config.json says so that transformers loads the weights as they are stored."""
    if bits == 8:
        return {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": False,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "float16" if dtype == "float16" else "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    }


def _is_linear(name: str) -> bool:
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


def _in_4_bits(name: str, weight: torch.Tensor) -> Tensors:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=BLOCK_SIZE, quant_type="nf4")
    return {name: packed, **{f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}}


def _in_8_bits(name: str, weight: torch.Tensor) -> Tensors:
    from bitsandbytes.functional import int8_vectorwise_quant

    rows, scales, _ = int8_vectorwise_quant(weight.to(torch.float16))
    stem = name.removesuffix("weight")
    return {name: rows, f"{stem}SCB": scales, f"{stem}weight_format": torch.tensor(0, dtype=torch.uint8)}


def _planned(name: str, weight: torch.Tensor, bits: Bits) -> Tensors:
    """Names and sizes of what the quantisers give, without values."""
    stem, count = name.removesuffix("weight"), weight.numel()
    if bits == 8:
        return {
            name: torch.empty(weight.shape, dtype=torch.int8, device="meta"),
            f"{stem}SCB": torch.empty(weight.shape[0], device="meta"),
            f"{stem}weight_format": torch.empty((), dtype=torch.uint8, device="meta"),
        }
    return {
        name: torch.empty((math.ceil(count / 2), 1), dtype=torch.uint8, device="meta"),
        f"{name}.absmax": torch.empty(math.ceil(count / BLOCK_SIZE), device="meta"),
        f"{name}.quant_map": torch.empty(16, device="meta"),
        f"{name}.quant_state.bitsandbytes__nf4": torch.empty(QUANT_STATE_BYTES, dtype=torch.uint8, device="meta"),
    }
