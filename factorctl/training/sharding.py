"""Spreading a model over the processes that train it (FSDP2): each keeps a part of every weight, gradient and moment.

A decoder layer is one unit: its weights, frozen and trained, teacher and student, are put together before it runs and
let go of behind it. Embeddings, final norm and head are the root's unit, together during a whole step. Layers are
sharded one by one as they are loaded, so that the whole model never lies on one device.

accelerate would shard a model that was loaded whole, and does so on GPUs only. Here the same code runs everywhere, and
accelerate is left to join the processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from factorctl.errors import UsageError

_REFUSED = {
    "FSDP_OFFLOAD_PARAMS": ("true", "--fsdp_offload_params true", "leave it out; more processes need less memory each"),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "true",
        "--fsdp_activation_checkpointing true",
        "use factorctl's own --gradient-checkpointing",
    ),
    "FSDP_RESHARD_AFTER_FORWARD": ("false", "--fsdp_reshard_after_forward false", "leave it out"),
}
"""Options of `accelerate launch` that would be ignored: variable -> value, how it was asked for, what to do."""


def sharding_asked_for() -> bool:
    """Whether `accelerate launch --use_fsdp` started this process.

    Raises:
        UsageError: FSDP 1, or an option that is not followed.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError("finetune shards with FSDP2 alone", "accelerate launch --use_fsdp --fsdp_version 2 ...")
    for variable, (value, option, hint) in _REFUSED.items():
        if os.environ.get(variable, "").lower() == value:
            raise UsageError(f"finetune does not follow accelerate's {option}", hint)
    return True


def process_mesh(device: torch.device, world_size: int) -> DeviceMesh:
    """All processes in a row; accelerate has joined them."""
    return init_device_mesh(device.type, (world_size,))


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Keep of `module`, in place, this process's part of what is not sharded yet; layers first, then the whole.

    Integers stay whole: bitsandbytes' quantised weights mean nothing in parts.
    """
    integers = {p for p in module.parameters() if not p.is_floating_point()}
    fully_shard(module, mesh=mesh, shard_placement_fn=_even_dimension(mesh.size()), ignored_params=integers)


def _even_dimension(parts: int) -> Callable[[nn.Parameter], Shard]:
    """Along which dimension to cut: 4 experts over 8 processes would leave half of them without any."""

    def choose(parameter: nn.Parameter) -> Shard:
        even = (dim for dim, size in enumerate(parameter.shape) if size % parts == 0)
        return Shard(next(even, 0))

    return choose


def all_gathered(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is spread over processes, put together (all of them must call this); others as they are."""
    if isinstance(tensor, DTensor):
        full: torch.Tensor = tensor.full_tensor()
        return full
    return tensor


def placed_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor, which every process has, on the device of `parameter` and spread as that is."""
    if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:
        here = tensor.to(parameter.device)
        return distribute_tensor(here, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor.to(parameter.device)
