"""`--to bnb-4bit` and `--to bnb-8bit`: a form of safetensors whose large weights bitsandbytes quantised.

Where no expert is routed, all of them on (K = N) or none (K = 0), the form is the source's dense architecture, and
stock transformers loads it. Where experts are routed it is the stock mixture of experts of `--to hf`, its fused experts
quantised too. transformers' own switch skips these, so `factorctl.load` loads that directory: as the stock class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from factorctl.exporting.stock.architecture import Tensors
from factorctl.exporting.stock.dense import DenseLayout
from factorctl.exporting.stock.tensors import StockLayout
from factorctl.models.families import ReadTensor
from factorctl.models.quantised.storage import Bits, is_quantised, quantised


@dataclass(frozen=True)
class BnbLayout:
    """The units of a checkpoint in full precision, every projection and every expert quantised."""

    full: DenseLayout | StockLayout
    bits: Bits

    @property
    def num_units(self) -> int:
        return self.full.num_units

    def unit(self, index: int, read: ReadTensor) -> Tensors:
        tensors: Tensors = {}
        for name, tensor in self.full.unit(index, read).items():
            tensors |= quantised(name, tensor, self.bits) if is_quantised(name) else {name: tensor}
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
