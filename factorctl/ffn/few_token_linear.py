"""Matrix products of few tokens on a CPU, in the form that keeps all cores busy and its memory streaming.

Without gradient that is the compiled kernel of `factorctl.ffn.kernel`. What follows serves where no compiler made one.

MKL's float32 product x W^T of few rows runs on one core and leaves the others idle: a layer that waits for memory then
takes twice as long as it need. Two other forms of the same product do better, each somewhere:

- rows:    the weight's rows cut into bands, a band to each core, by a batched product;
- columns: the same bands from the left, W x^T: MKL streams a contiguous weight of short rows at the memory's speed.

Microseconds on 2 cores of a Zen 5 server, weights from memory, `F.linear` / rows / columns:

| weight [O, I]                | 1 token           | 2 tokens           | 4 tokens           | 8 tokens           |
|------------------------------|-------------------|--------------------|--------------------|--------------------|
| [3072, 576]                  | 656 / 458 / 243   | 1043 / 612 / 320   | 873 / 584 / 287    | 860 / 751 / 688    |
| [2816, 2048]                 | 1344 / 942 / 738  | 2729 / 1385 / 1055 | 2678 / 1726 / 2087 | 2370 / 1780 / 2520 |
| [2048, 1408] of rows of 5632 | 855 / 644 / 868   | 1797 / 916 / 1080  | 1451 / 856 / 1161  | 1237 / 1111 / 1690 |

oneDNN's bfloat16 product uses all cores by itself and stays as it is. The dense model runs on the same products as the
factored one, so that no speed-up comes from here.

T tokens, I inputs, O outputs, B bands.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from factorctl.ffn.kernel import cpu as cpu_kernel

MAX_KERNEL_TOKENS = {torch.float32: 128, torch.bfloat16: 16}
MAX_TOKENS = 128
MIN_WEIGHTS = 1 << 16
"""A smaller weight fits into a core's cache, and one core is done with it before a second has begun."""
BANDS_PER_THREAD = (4, 2, 1)
"""Preferred first; the number of bands has to divide the outputs."""
MIN_BAND_ROWS = 256
"""With more than a band to a core: narrower ones take up to 1.1 times as long."""
MAX_COLUMNS_INPUTS = {1: 4096, 2: 4096, 3: 1024, 4: 1024}
"""By tokens: the longest contiguous rows that columns pay for."""


def linear(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear(x, weight_OI, bias_O)` for x of [..., I]."""
    if serves_kernel(x, weight_OI):
        return cpu_kernel.linear(x, weight_OI, bias_O)
    bands = 1 if torch.compiler.is_compiling() else bands_for(x, weight_OI)
    if bands == 1:
        return F.linear(x, weight_OI, bias_O)
    x_TI = x.reshape(-1, x.shape[-1])
    y = form_for(len(x_TI), weight_OI)(x_TI, weight_OI, bands).view(*x.shape[:-1], -1)
    return y if bias_O is None else y + bias_O


def serves_kernel(x: torch.Tensor, weight_OI: torch.Tensor) -> bool:
    """Whether the compiled kernel can take this product and is ahead of torch's."""
    outputs, inputs = weight_OI.shape
    return (
        cpu_kernel.can_run(x, weight_OI)
        and inputs <= x.numel() <= MAX_KERNEL_TOKENS[weight_OI.dtype] * inputs
        and outputs * inputs >= MIN_WEIGHTS
        and weight_OI.stride(1) == 1
    )


def bands_for(x: torch.Tensor, weight_OI: torch.Tensor) -> int:
    """How many bands the weight's outputs divide into; 1 where that would win nothing, and where gradients flow."""
    outputs, inputs = weight_OI.shape
    if (
        weight_OI.dtype != torch.float32
        or not weight_OI.is_cpu
        or not inputs <= x.numel() <= MAX_TOKENS * inputs
        or outputs * inputs < MIN_WEIGHTS
        or (weight_OI.requires_grad and torch.is_grad_enabled())
        or torch.is_autocast_enabled("cpu")
    ):
        return 1
    threads = torch.get_num_threads()
    if threads == 1:
        return 1
    for bands in (threads * each for each in BANDS_PER_THREAD):
        if outputs % bands == 0 and (outputs >= bands * MIN_BAND_ROWS or bands == threads):
            return bands
    return 1


def form_for(tokens: int, weight_OI: torch.Tensor) -> Form:
    """The fastest form by the table above."""
    if weight_OI.is_contiguous() and weight_OI.shape[1] <= MAX_COLUMNS_INPUTS.get(tokens, 0):
        return in_columns
    return in_rows


def in_rows(x_TI: torch.Tensor, weight_OI: torch.Tensor, bands: int) -> torch.Tensor:
    """x W^T, [T, O], in bands of W's rows; they are views, nothing is copied but the result."""
    weight_BIO = weight_OI.unflatten(0, (bands, -1)).transpose(1, 2)
    y_BTO = torch.bmm(x_TI.expand(bands, -1, -1), weight_BIO)
    return y_BTO.transpose(0, 1).reshape(len(x_TI), -1)


def in_columns(x_TI: torch.Tensor, weight_OI: torch.Tensor, bands: int) -> torch.Tensor:
    """(W x^T)^T, [T, O], in bands of W's rows."""
    y_BOT = torch.bmm(weight_OI.unflatten(0, (bands, -1)), x_TI.t().expand(bands, -1, -1))
    return y_BOT.flatten(0, 1).t().contiguous()


Form = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
