"""What to say when the device runs out of memory: what was tried, the peak, what is kept, which options to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from factorctl.errors import ResourceError
from factorctl.memory import peak_memory
from factorctl.training.batches import BatchPlan


@contextmanager
def memory_explained(
    where: str, plan: BatchPlan, device: torch.device, keep: Callable[[], str], *, rehearsed: bool = False
) -> Iterator[None]:
    """Turn CUDA's out-of-memory into an error that helps.

    Args:
        where: what was being done, as in "out of memory WHERE".
        keep: saves what can be saved and says what there is to go on from.
        rehearsed: nothing is written, so there will be nothing to resume.

    Raises:
        ResourceError: in place of the device's own.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        peak = peak_memory(device)
        smaller = f"--micro-batch {plan.micro_batch // 2} or " if plan.micro_batch > 1 else ""
        again = "try" if rehearsed else "go on with --resume and"
        raise ResourceError(
            f"out of memory {where} with {plan.micro_batch} x {plan.block_length} tokens at once; peak "
            f"{peak / 1e9:.1f} GB; {keep()}",
            f"{again} {smaller}--gradient-checkpointing; or start over with --precision bfloat16, "
            "--optimizer adamw-8bit, --teacher-quant 8bit or shorter blocks; several GPUs can share one model: "
            "accelerate launch --use_fsdp --fsdp_version 2",
        ) from error
