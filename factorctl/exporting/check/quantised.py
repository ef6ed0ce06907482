"""Reading a quantised export back: every weight within half a step of what it stands for, all others equal.

Logits cannot prove this. Where routing is unstable, as with a router that was never trained, rounding sends tokens to
other experts and the answers part, however well every weight is kept.
"""

from __future__ import annotations

import torch

from factorctl.checkpoint.reader import CheckpointReader
from factorctl.errors import IntegrityError
from factorctl.exporting.stock.bnb import BnbLayout
from factorctl.models.families import ReadTensor
from factorctl.models.quantised.loading import dequantised
from factorctl.models.quantised.storage import BLOCK_SIZE, is_quantised

WIDEST_NF4_GAP = 1 - 0.6961928
"""Between the two lowest of nf4's 16 values, of which the largest magnitude is 1."""
SLACK = {4: 1.01, 8: 1.2}
"""Arithmetic in float32; in 8 bits weights are rounded to float16 first."""


def check_steps(layout: BnbLayout, read: ReadTensor, export: CheckpointReader) -> None:
    """Compare an export with the form in full precision that it was made of, unit by unit.

    Raises:
        IntegrityError: naming the first tensor that strays.
    """
    for unit in range(layout.num_units):
        for name, weight in layout.full.unit(unit, read).items():
            if is_quantised(name):
                held = dequantised(name, weight.shape, layout.bits, export)
                strays = (held - weight.float()).abs() > SLACK[layout.bits] * _half_step(weight.float(), layout.bits)
            else:
                strays = export.read(name) != weight
            if bool(strays.any()):
                raise IntegrityError(
                    f"tensor {name} of the export is not what it stands for: {int(strays.sum())} of {strays.numel()} "
                    "weights are off by more than a rounding step",
                    "nothing was published",
                )


def _half_step(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """How far rounding may move each weight: half a step of its row in 8 bits, half the widest of its block in 4."""
    if bits == 8:
        return weight.abs().amax(-1, keepdim=True) / 127 / 2
    flat = weight.flatten().abs()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    largest = blocks.amax(-1, keepdim=True).expand_as(blocks).flatten()[: len(flat)]
    return (largest * WIDEST_NF4_GAP / 2).view(weight.shape)
