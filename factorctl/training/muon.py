"""Muon for the matrices of experts: momentum, made orthogonal block by block, at AdamW's root mean square.

A block is one matrix with one meaning: the gate rows of one expert, its up rows, its columns of the down-projection,
and the same of the shared neurons. torch.optim.Muon takes one 2-D parameter at a time, and these lie stacked in
[N, 2H, D] and side by side in [D, F]; all blocks of one shape go through the iteration together, as views. The step is
torch's with `adjust_lr_fn="match_rms_adamw"`: Newton-Schulz with Keller Jordan's coefficients
(kellerjordan.github.io/posts/muon), its size as in Moonlight (arXiv 2502.16982).

B blocks, R rows, C columns of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from factorctl.ffn.layer import FactoredFFN

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
ADAMW_RMS = 0.2
"""Root mean square of AdamW's steps in units of the learning rate, as Moonlight found it."""
Blocks = Callable[[torch.Tensor], list[torch.Tensor]]
"""A parameter, or its gradient, as views [B, R, C] that together are all of it."""


class Muon(torch.optim.Optimizer):
    """One momentum per value; steps on whole tensors, each cut into its blocks.

    Args:
        blocks: how each parameter falls into matrices.
    """

    def __init__(self, blocks: Mapping[nn.Parameter, Blocks], *, lr: float, weight_decay: float) -> None:
        super().__init__(list(blocks), {"lr": lr, "weight_decay": weight_decay})
        self.blocks = blocks

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no loss is computed anew
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group["lr"], group["weight_decay"])

    def _step(self, parameter: nn.Parameter, lr: float, weight_decay: float) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        ahead = gradient.lerp(momentum, MOMENTUM)  # Nesterov's
        parameter.mul_(1 - lr * weight_decay)
        cut = self.blocks[parameter]
        for own_BRC, update_BRC in zip(cut(parameter.detach()), cut(ahead), strict=True):
            size = lr * ADAMW_RMS * math.sqrt(max(own_BRC.shape[1:]))
            own_BRC.sub_(orthogonal(update_BRC), alpha=size)


def orthogonal(matrices_BRC: torch.Tensor) -> torch.Tensor:
    """Each matrix with its singular values brought near 1, between 0.7 and 1.2, by Newton-Schulz iterations.

    In bfloat16 on a GPU, where that is fast and, as the values need not be exact, enough.
    """
    dtype = torch.bfloat16 if matrices_BRC.is_cuda else matrices_BRC.dtype
    tall = matrices_BRC.shape[1] > matrices_BRC.shape[2]
    x = (matrices_BRC.transpose(1, 2) if tall else matrices_BRC).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.transpose(1, 2) if tall else x).to(matrices_BRC.dtype)


def blocks_of(ffn: FactoredFFN) -> dict[nn.Parameter, Blocks]:
    """The matrices of a layer's experts and shared neurons; biases and the router are none."""
    shape = ffn.shape
    size, shared = shape.expert_size, shape.shared_size

    def gate_up(tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.view(2 * shape.num_experts, size, -1)]

    def shared_gate_up(tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.view(2, shared, -1)]

    def down(tensor: torch.Tensor) -> list[torch.Tensor]:
        routed = tensor[:, shared:].unflatten(1, (shape.num_experts, size)).transpose(0, 1)
        return [tensor[:, :shared].unsqueeze(0), routed] if shared else [routed]

    found: dict[nn.Parameter, Blocks] = {ffn.gate_up: gate_up, ffn.down: down}
    if ffn.shared_gate_up is not None:
        found[ffn.shared_gate_up] = shared_gate_up
    return found
