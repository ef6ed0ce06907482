"""Matrix products of few tokens on a CPU, in the form that keeps all cores busy and its memory streaming.

Without gradient that is our own kernel of `factorctl.ffn.kernel`. What follows serves where no compiler made one.

MKL's float32 product x W^T of few rows runs on one core and leaves the others idle: a layer that waits for memory then
takes twice as long as it need. So the weight's rows are cut into bands, a band to each core, by one batched product:
for one or two tokens from the left, W x^T, which MKL streams at the memory's speed where the weight is contiguous, for
more from the right.

Microseconds on 2 cores of a Zen 5 server, weights from memory, `F.linear` / bands:

| weight [O, I] | 1 token      | 2 tokens     | 4 tokens     | 8 tokens      |
|---------------|--------------|--------------|--------------|---------------|
| [3072, 576]   | 339 / 157    | 460 / 176    | 512 / 196    | 542 / 407     |
| [2816, 2048]  | 1029 / 522   | 2074 / 727   | 1968 / 1184  | 3668 / 1318   |
| [49152, 576]  | 11510 / 2559 | 30738 / 6954 | 26596 / 7060 | 24161 / 17077 |

oneDNN's bfloat16 product uses all cores by itself and stays as it is. The dense model runs on the same products as the
factored one, so that no speed-up comes from here.

T tokens, I inputs, O outputs, B bands.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from factorctl.ffn.kernel import cpu as cpu_kernel

MAX_KERNEL_TOKENS = {torch.float32: 128, torch.bfloat16: 16}
MAX_TOKENS = 128
MIN_WEIGHTS = 1 << 16
"""A smaller weight fits into a core's cache, and one core is done with it before a second has begun."""
MAX_TOKENS_FROM_LEFT = 2


def linear(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear(x, weight_OI, bias_O)` for x of [..., I]."""
    if serves_kernel(x, weight_OI):
        return cpu_kernel.linear(x, weight_OI, bias_O)
    bands = 1 if torch.compiler.is_compiling() else bands_for(x, weight_OI)
    if bands == 1:
        return F.linear(x, weight_OI, bias_O)
    y = in_bands(x.reshape(-1, x.shape[-1]), weight_OI, bands).view(*x.shape[:-1], -1)
    return y if bias_O is None else y + bias_O


def serves_kernel(x: torch.Tensor, weight_OI: torch.Tensor) -> bool:
    """Whether our kernel can take this product and is ahead of torch's."""
    outputs, inputs = weight_OI.shape
    return (
        cpu_kernel.can_run(x, weight_OI)
        and inputs <= x.numel() <= MAX_KERNEL_TOKENS[weight_OI.dtype] * inputs
        and outputs * inputs >= MIN_WEIGHTS
        and weight_OI.stride(1) == 1
    )


def bands_for(x: torch.Tensor, weight_OI: torch.Tensor) -> int:
    """A band to each core; 1 where that would win nothing or not come out even, and where gradients flow."""
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
    return threads if outputs % threads == 0 else 1


def in_bands(x_TI: torch.Tensor, weight_OI: torch.Tensor, bands: int) -> torch.Tensor:
    """x W^T, [T, O], in bands of W's rows; they are views, nothing is copied but the result."""
    weight_BOI = weight_OI.unflatten(0, (bands, -1))
    if len(x_TI) <= MAX_TOKENS_FROM_LEFT and weight_OI.is_contiguous():
        return torch.bmm(weight_BOI, x_TI.t().expand(bands, -1, -1)).flatten(0, 1).t().contiguous()
    return torch.bmm(x_TI.expand(bands, -1, -1), weight_BOI.transpose(1, 2)).transpose(0, 1).flatten(1)
