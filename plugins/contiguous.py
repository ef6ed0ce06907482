"""Cut the neurons into runs, in the order in which the dense model holds them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from factorctl.contracts import DenseFFN, LayerStats, Partition, PartitionSpec, Stat


class Contiguous:
    """Expert e gets neurons e*H to (e+1)*H - 1: the split that FactorLLM's released code makes.

    The order of a trained FFN's neurons carries no meaning, so this is a random split that needs no seed.
    """

    name = "contiguous"
    reference = "FactorLLM, https://arxiv.org/abs/2408.11855"
    option_names: frozenset[str] = frozenset()

    def needs(self, options: Mapping[str, str]) -> frozenset[Stat]:
        return frozenset()

    def partition(self, ffn: DenseFFN, stats: LayerStats | None, spec: PartitionSpec) -> Partition:
        return Partition(torch.arange(ffn.intermediate_size).reshape(spec.num_experts, -1))
