"""Which splits are tried, and in which order: from coarse to fine, static pruning beside routing.

F intermediate_size, N num_experts, K top_k, S shared_size; S + N*H = F. A static split is K = 0: S neurons alone run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Literal, TypeVar

from factorctl.config.frontier import FrontierConfig
from factorctl.config.shape import FactorShape, factor_shape

MOST_ACTIVE = 0.85
"""Of the FFN: beyond it there is next to no speed to win."""
SWEPT = 6
"""Numbers of active experts per partition."""
STATIC_EXPERTS = 2
"""What does not run is cut into the fewest experts there can be."""

Kind = Literal["static", "routed"]
T = TypeVar("T")


def kind_of(shape: FactorShape) -> Kind:
    return "routed" if shape.top_k else "static"


def name_of(shape: FactorShape) -> str:
    """'1R8E3K+S384', or 'static-768' where 768 neurons alone run."""
    return shape.notation if shape.top_k else f"static-{shape.shared_size}"


def family_of(shape: FactorShape) -> str:
    """What shares a partition: all K of one N and S."""
    return f"{shape.num_experts}E+S{shape.shared_size}"


def families(config: FrontierConfig, intermediate_size: int) -> list[FactorShape]:
    """One shape per partition, with the K that its partition is found for: the middle of those that are swept.

    Raises:
        UsageError: a number of experts or a shared fraction does not fit the FFN.
    """
    found = [
        factor_shape(intermediate_size, num_experts=experts, top_k=1, shared_fraction=shared)
        for experts in dict.fromkeys(config.experts)
        for shared in dict.fromkeys(config.shared_fraction)
    ]
    return [replace(shape, top_k=swept(shape)[len(swept(shape)) // 2]) for shape in found]


def swept(shape: FactorShape) -> list[int]:
    """At most `SWEPT` numbers of active experts, evenly spread from 1 to what leaves something to win."""
    possible = [
        k for k in range(1, shape.num_experts) if replace(shape, top_k=k).active_ffn_fraction <= MOST_ACTIVE
    ] or [1]
    if len(possible) <= SWEPT:
        return possible
    return sorted({possible[round(i * (len(possible) - 1) / (SWEPT - 1))] for i in range(SWEPT)})


def static_shape(intermediate_size: int, active_neurons: int) -> FactorShape:
    """Static pruning to so many neurons, or one fewer: what is left out must split into two equal experts."""
    left_out = max(1, math.ceil((intermediate_size - active_neurons) / STATIC_EXPERTS))
    return FactorShape(STATIC_EXPERTS, 0, left_out, intermediate_size - STATIC_EXPERTS * left_out)


def coarse_to_fine(found: Sequence[FactorShape]) -> list[FactorShape]:
    """All splits of the grid, in an order that spans it at any moment.

    Each partition is swept from its middle outward into ever smaller gaps, and every routed split has a static one of
    as many active neurons beside it, so that the two can be told apart.
    """
    sweeps = [_halving([replace(shape, top_k=k) for k in swept(shape)]) for shape in found]
    routed = [shape for turn in zip_longest(*sweeps) for shape in turn if shape is not None]
    return list(_each_once(_with_static_beside(routed)))


def _with_static_beside(routed: Iterable[FactorShape]) -> Iterator[FactorShape]:
    for shape in routed:
        yield static_shape(shape.intermediate_size, shape.active_neurons)
        yield shape


def _halving(items: Sequence[T]) -> Iterator[T]:
    """The middle, then the middles of both halves, and so on."""
    spans = [(0, len(items))]
    for first, end in spans:  # grows while it is read
        if first < end:
            middle = (first + end) // 2
            yield items[middle]
            spans += [(first, middle), (middle + 1, end)]


def _each_once(shapes: Iterable[FactorShape]) -> Iterator[FactorShape]:
    seen: set[str] = set()
    for shape in shapes:
        if name_of(shape) not in seen and shape.active_neurons:
            seen.add(name_of(shape))
            yield shape
