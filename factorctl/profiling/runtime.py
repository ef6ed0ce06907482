"""How a forward pass is run and timed: eagerly with a growing cache, or as a compiled graph over a static one.

On CPUs, and for prefill everywhere, the model runs eagerly as `generate()` runs it. On CUDA a decoding step is a few
hundred small kernels, whose launches cost more than the kernels; there it is compiled to one CUDA graph over a static
cache, for every variant alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

Clock = Callable[[], float]


def synchronised_clock(device: torch.device) -> Clock:
    """Seconds, once the device has finished what it was given."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


class Runtime(Protocol):
    """One variant's forward passes over one batch; a new prefill starts over."""

    def prefill(self, ids_BP: torch.Tensor) -> torch.Tensor:
        """The logits of the last position, [B, 1, V]."""
        ...

    def decode(self, ids_B1: torch.Tensor) -> torch.Tensor:
        """The logits after one more token per sequence, [B, 1, V]."""
        ...


@dataclass
class EagerRuntime:
    """The model as `generate()` runs it by default."""

    model: PreTrainedModel
    cache: DynamicCache | None = None

    def prefill(self, ids_BP: torch.Tensor) -> torch.Tensor:
        self.cache = DynamicCache(config=self.model.config)
        return self.decode(ids_BP)

    def decode(self, ids_B1: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(ids_B1, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        return logits


@dataclass
class GraphRuntime:
    """Decoding as one compiled graph over a static cache of `max_tokens`.

    `coordinate_descent_tuning` makes inductor fuse the `slot` path's gather into its products; `reduce-overhead`, the
    usual mode for CUDA graphs, does not set it and would copy the weights of every chosen expert.
    """

    model: PreTrainedModel
    max_tokens: int
    compile_options: dict[str, Any] = field(
        default_factory=lambda: {"options": {"triton.cudagraphs": True, "coordinate_descent_tuning": True}}
    )

    def __post_init__(self) -> None:
        self.cache: StaticCache | None = None
        self._step = torch.compile(self._forward, fullgraph=True, dynamic=False, **self.compile_options)

    def _forward(self, ids_BT: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(
            ids_BT, position_ids=position_ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits
        return logits

    def prefill(self, ids_BP: torch.Tensor) -> torch.Tensor:
        if self.cache is None:
            self.cache = StaticCache(config=self.model.config, max_cache_len=self.max_tokens)
        else:
            self.cache.reset()
        self.position = ids_BP.shape[1]
        return self._forward(ids_BP, torch.arange(self.position, device=ids_BP.device)[None])

    def decode(self, ids_B1: torch.Tensor) -> torch.Tensor:
        position_ids = torch.full((1, 1), self.position, device=ids_B1.device)
        self.position += 1
        logits: torch.Tensor = self._step(ids_B1, position_ids)
        return logits


def make_runtime(model: PreTrainedModel, device: torch.device, max_tokens: int) -> Runtime:
    return GraphRuntime(model, max_tokens) if device.type == "cuda" else EagerRuntime(model)
