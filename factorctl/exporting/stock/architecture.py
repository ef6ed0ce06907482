"""What one stock architecture says of itself, in a file of its own in `architectures`.

Their routers are free of biases and give the chosen K gates that sum to one; they differ in what stands around them.
Sources, read unless marked as run: transformers 5.23 `models/*/modeling_*.py` (run), vLLM `model_executor/models/*.py`,
mlx-lm 0.32 `models/*.py` (run), llama.cpp `src/models/*.cpp` (run through xllamacpp).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from factorctl.config.shape import FactorShape
from factorctl.exporting.engines import Engine, Flaw, Served
from factorctl.exporting.features import Biases
from factorctl.exporting.stock.folding import StockFFN
from factorctl.exporting.stock.padding import LEAST_SHARED, SharedPlace, StockSizes, filled_up, rounded_up, sizes_of
from factorctl.models.families import DenseModel

Tensors = dict[str, torch.Tensor]
NamesTensors = Callable[[StockFFN, str], Tensors]
"""From an FFN and the prefix of its layer, `model.layers.7.`, to tensors by name."""


@dataclass(frozen=True)
class GgufGraph:
    """The graph of llama.cpp that computes an architecture."""

    name: str
    metadata: Callable[[DenseModel, StockSizes], Mapping[str, int | float]]
    """Keys beyond those of every graph, without the graph's name."""
    rotates_neighbours: bool = True
    """Whether RoPE turns neighbouring rows of a head; else rows half a head apart, as in transformers."""
    biases: Biases = "query-key-value-output"
    """The most attention biases that it loads."""
    reads_rope_factors: bool = True
    """Whether it takes llama3's scaling of RoPE, `rope_freqs`."""


@dataclass(frozen=True)
class Architecture:
    """One stock mixture-of-experts architecture."""

    option: str
    """What `--arch` calls it: the name of its file."""
    model_type: str
    class_name: str
    shared: SharedPlace
    config: Callable[[DenseModel, int, StockSizes], dict[str, Any]]
    """Its own keys of config.json, from the dense model, the number of experts and their sizes."""
    experts: NamesTensors
    """Router and experts under the names of its files: those of transformers 4, which vLLM and llama.cpp read."""
    engines: tuple[Engine, ...]
    """That load it and generate with it."""
    flaws: tuple[Flaw, ...] = ()
    """What of these computes something else, and when."""
    beside: NamesTensors = lambda ffn, layer: {}
    """What stands beside the experts, under the same names in files and in memory."""
    block: str = "mlp"
    """The module that holds router and experts in memory, in transformers 5."""
    router: str = "gate"
    """The router's name in it."""
    families: tuple[str, ...] = ()
    """Dense families whose own mixture of experts it is."""
    gguf: GgufGraph | None = None
    """None where no graph of llama.cpp computes it as transformers does."""
    biases: Biases = "none"
    """The most attention biases that it can hold; what a source lacks of them is zero."""
    always_biased: bool = False
    """Whether it has biases where the source has none."""
    qk_norm: Literal["none", "optional", "always"] = "none"
    reads_head_dim: bool = False
    """Whether vLLM takes head_dim from the config; else it computes hidden_size / num_attention_heads."""
    has_window: bool = False
    """Whether it can attend within one sliding window in all layers."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """What of the router's logits is normalised over the K chosen ones."""
    counts_shared_experts: bool = False
    """Whether the shared MLP has to be as large as a whole number of experts."""
    ties_head: bool = True
    """Whether vLLM takes the embeddings for the head; else the head is always stored."""

    @property
    def title(self) -> str:
        """Its name in a sentence: `Qwen3-MoE`."""
        return self.option.title().replace("Moe", "MoE")

    def sizes(self, shape: FactorShape, multiple: int) -> StockSizes:
        """The sizes of its experts and its shared MLP, each a multiple of `multiple`."""
        sizes = filled_up(sizes_of(shape, self.shared), multiple)
        shared = max(sizes.shared, LEAST_SHARED) if self.shared in ("own", "gated") else sizes.shared
        return StockSizes(sizes.expert, rounded_up(shared, sizes.expert) if self.counts_shared_experts else shared)

    def flaws_in(self, served: Served) -> list[Flaw]:
        """Every engine that loads this export and does not compute what it should."""
        return [flaw for flaw in self.flaws if flaw.applies(served)]

    def engines_that_run(self, served: Served) -> list[Engine]:
        """The engines that load this export and compute what they should."""
        wrong = {flaw.engine for flaw in self.flaws_in(served)}
        return [engine for engine in self.engines if engine not in wrong]


def per_expert(
    ffn: StockFFN, prefix: str, *, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> Tensors:
    """The router as `gate`, and three matrices for every expert."""
    tensors = {f"{prefix}gate.weight": ffn.router_ND}
    for stem, stacked in ((gate, ffn.gate_NHD), (up, ffn.up_NHD), (down, ffn.down_NDH)):
        tensors |= {f"{prefix}experts.{expert}.{stem}.weight": part for expert, part in enumerate(stacked.unbind())}
    return tensors


def shared_expert(ffn: StockFFN, prefix: str) -> Tensors:
    """The shared MLP as three matrices."""
    names = [f"{prefix}{stem}.weight" for stem in ("gate_proj", "up_proj", "down_proj")]
    return dict(zip(names, shared_mlp(ffn), strict=True))


def shared_mlp(ffn: StockFFN) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gate, up and down of the shared MLP, which `folding` made where nothing was shared."""
    assert ffn.shared_gate_SD is not None
    assert ffn.shared_up_SD is not None
    assert ffn.shared_down_DS is not None
    return ffn.shared_gate_SD, ffn.shared_up_SD, ffn.shared_down_DS
