"""Streaming a layout into safetensors shards: at most one unit and one shard are in memory.

The same functions that produce the tensors are first run on meta tensors, which have shapes and no values; so the
number of shards, and with it every file name, is known before the first byte is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from factorctl.checkpoint.builder import ArtefactBuilder
from factorctl.checkpoint.reader import CheckpointReader, all_finite
from factorctl.errors import UsageError
from factorctl.exporting.stock.architecture import Tensors
from factorctl.models.families import ReadTensor
from factorctl.progress import Progress


class Layout(Protocol):
    """A checkpoint as a sequence of units, each a few named tensors."""

    @property
    def num_units(self) -> int: ...

    def unit(self, index: int, read: ReadTensor) -> Tensors: ...


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the export before it exists."""

    unit: int
    name: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class ShardPlan:
    """Which tensors go into which file, in order."""

    shards: tuple[tuple[PlannedTensor, ...], ...]

    @property
    def total_bytes(self) -> int:
        return sum(tensor.nbytes for shard in self.shards for tensor in shard)


def plan_shards(layout: Layout, reader: CheckpointReader, max_shard_bytes: int) -> ShardPlan:
    """Fill shards in order, none larger than `max_shard_bytes` unless a single tensor is."""
    shards: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in planned_tensors(layout, reader):
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return ShardPlan(tuple(tuple(shard) for shard in shards))


def planned_tensors(layout: Layout, reader: CheckpointReader) -> Iterator[PlannedTensor]:
    """Every tensor of the layout with its size; no weight is read."""

    def shape_only(name: str) -> torch.Tensor:
        entry = reader.entry(name)
        return torch.empty(entry.shape, dtype=entry.dtype, device="meta")

    for unit in range(layout.num_units):
        for name, tensor in layout.unit(unit, shape_only).items():
            yield PlannedTensor(unit, name, tuple(tensor.shape), tensor.numel() * tensor.dtype.itemsize)


def write_shards(
    layout: Layout, plan: ShardPlan, reader: CheckpointReader, builder: ArtefactBuilder, progress: Progress
) -> None:
    """Write every shard that an interrupted run has not written already.

    Raises:
        UsageError: a value does not fit the export's dtype.
    """
    at, tensors = -1, {}
    with progress.stage("Writing", total=len(plan.shards), unit="shard") as task:
        for index, shard in enumerate(plan.shards):
            if builder.finished(index) is None:
                content: Tensors = {}
                for planned in shard:
                    if planned.unit != at:
                        at, tensors = planned.unit, layout.unit(planned.unit, reader.read)
                    content[planned.name] = _checked(planned.name, tensors[planned.name])
                builder.write_shard(index, content, {})
            task.advance()


def _checked(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not all_finite(tensor):
        raise UsageError(
            f"tensor {name} overflows {str(tensor.dtype).removeprefix('torch.')}", "choose --dtype bfloat16 or float32"
        )
    return tensor
