"""How bitsandbytes' weights lie in a safetensors file: which tensors are quantised, and into what.

    4 bits   NAME                                 [bytes, 1] uint8, two nf4 codes each
             NAME.absmax                          [blocks], one scale per 64 weights
             NAME.quant_map, NAME.quant_state.*   the 16 values of nf4; block size, dtype and shape as JSON
    8 bits   NAME                                 [rows, columns] int8
             STEM.SCB                             [rows], one scale per row

STEM is NAME without `.weight`. Linear layers are stored as transformers stores them. Fused experts, [N, rows, columns]
and one parameter of a module, are stored as bitsandbytes' own `nn.parametrize` saves such parameters, in 8 bits as
[N*rows, columns]. Both differ in shape from the parameter, so stock transformers, whose switch quantises `nn.Linear`
only, raises a size mismatch instead of taking codes for weights; `fused_config` sees to that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch

Bits = Literal[4, 8]
FUSED_METHOD = "factorctl-bitsandbytes"
BLOCK_SIZE = 64
"""Weights that share one scale in 4 bits."""
QUANT_STATE_BYTES = 100
"""About what the JSON beside each 4-bit weight takes."""
EXPERT_PARAMETERS = (".experts.gate_up_proj", ".experts.down_proj")
"""The fused experts of every mixture of experts in transformers 5."""


def is_quantised(name: str) -> bool:
    """Projections of attention and FFN and fused experts; embeddings, norms, routers and head keep their dtype."""
    is_linear = name.endswith(("_proj.weight", "_linear.weight"))
    return name.startswith("model.layers.") and (is_linear or is_fused(name))


def is_fused(name: str) -> bool:
    """Whether this is the parameter that holds all experts of a layer."""
    return name.endswith(EXPERT_PARAMETERS)


def quantised(name: str, weight: torch.Tensor, bits: Bits) -> dict[str, torch.Tensor]:
    """The tensors that stand for `weight`; of a meta tensor their sizes without values."""
    if weight.is_meta:
        return _planned(name, weight.shape, bits)
    return _in_4_bits(name, weight) if bits == 4 else _in_8_bits(name, weight)


def fused_config(bits: Bits) -> dict[str, Any]:
    """`quantization_config` of config.json where fused experts are quantised.

    A method of its own, and none of the keys by which transformers knows bitsandbytes: its quantiser for bitsandbytes
    switches the comparison of shapes off in transformers 5.17. Of a method that it does not know it warns, then loads
    without one and raises at the first shape. Other engines refuse unknown methods.
    """
    return {"quant_method": FUSED_METHOD, "bits": bits, "quant_type": storage_name(bits)}


def bits_of(config: Mapping[str, Any]) -> Bits | None:
    """What config.json says of fused experts: 4, 8, or None where they are not quantised."""
    for bits in get_args(Bits):
        if config.get("quantization_config") == fused_config(bits):
            return bits  # type: ignore[no-any-return]
    return None


def storage_name(bits: Bits) -> str:
    """What bitsandbytes calls the values."""
    return "nf4" if bits == 4 else "int8"


def scales_name(name: str) -> str:
    """Of the row scales of an 8-bit weight."""
    return f"{name.removesuffix('.weight')}.SCB"


def _in_4_bits(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK_SIZE, quant_type="nf4")
    return {name: packed, **{f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}}


def _in_8_bits(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    from bitsandbytes.functional import int8_vectorwise_quant

    rows, scales, _ = int8_vectorwise_quant(weight.to(torch.float16).flatten(0, -2).contiguous())
    return {name: rows, scales_name(name): scales, **_weight_format(name, torch.tensor(0, dtype=torch.uint8))}


def _planned(name: str, shape: torch.Size, bits: Bits) -> dict[str, torch.Tensor]:
    """Names and sizes of what the quantisers give, without values."""
    count, columns = shape.numel(), shape[-1]
    if bits == 8:
        return {
            name: torch.empty((count // columns, columns), dtype=torch.int8, device="meta"),
            scales_name(name): torch.empty(count // columns, device="meta"),
            **_weight_format(name, torch.empty((), dtype=torch.uint8, device="meta")),
        }
    return {
        name: torch.empty((math.ceil(count / 2), 1), dtype=torch.uint8, device="meta"),
        f"{name}.absmax": torch.empty(math.ceil(count / BLOCK_SIZE), device="meta"),
        f"{name}.quant_map": torch.empty(16, device="meta"),
        f"{name}.quant_state.bitsandbytes__nf4": torch.empty(QUANT_STATE_BYTES, dtype=torch.uint8, device="meta"),
    }


def _weight_format(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """What bitsandbytes writes beside 8-bit linear layers, always 0: rows in order."""
    return {} if is_fused(name) else {f"{name.removesuffix('.weight')}.weight_format": tensor}
