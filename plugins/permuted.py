"""Deal the neurons out at random: the control that a strategy with an idea has to beat."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from factorctl.contracts import DenseFFN, LayerStats, Partition, PartitionSpec, Stat

from .seeding import layer_generator


class Permuted:
    """A random permutation, cut into runs: FactorLLM's other split, LLaMA-MoE's independent random one.

    One permutation orders gate, up and down alike, and every layer draws its own.
    """

    name = "permuted"
    reference = "FactorLLM, https://arxiv.org/abs/2408.11855; LLaMA-MoE, https://arxiv.org/abs/2406.16554"
    option_names: frozenset[str] = frozenset()

    def needs(self, options: Mapping[str, str]) -> frozenset[Stat]:
        return frozenset()

    def partition(self, ffn: DenseFFN, stats: LayerStats | None, spec: PartitionSpec) -> Partition:
        order_F = torch.randperm(ffn.intermediate_size, generator=layer_generator(spec))
        return Partition(order_F.reshape(spec.num_experts, -1))
