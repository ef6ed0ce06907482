"""torch's own count of a real forward pass against ours.

FlopCounterMode counts the matrix products that reach the dispatcher. It knows no `grouped_mm`, gives 0 for scaled dot
product attention on CPUs and ignores causality elsewhere: the formula of the first is registered here, and attention
runs in its eager form, whose core is full. The count runs on the `grouped` path, which executes exactly what is active,
or on `masked`, which executes every expert, where sizes or dtype are not for `grouped`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from factorctl.errors import FactorctlError
from factorctl.ffn.paths import PathName
from factorctl.models.building import factored_ffns
from factorctl.profiling.flops import count_flops
from factorctl.profiling.sizes import ModelSizes

TOLERANCE = 1e-3


class FlopMismatchError(FactorctlError):
    """The analytic count is not what runs: no figure of this report could be believed."""


def grouped_mm_flops(a_shape: torch.Size, b_shape: torch.Size, *_: Any, **__: Any) -> int:
    """2 * P * in * out for P rows in all, whatever their split over the groups."""
    return 2 * a_shape[0] * a_shape[1] * b_shape[-1]


def counted_flops(run: Callable[[], object]) -> float:
    """FLOPs of the matrix products in `run`."""
    mapping = {torch.ops.aten._grouped_mm: grouped_mm_flops}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, torch.no_grad():
        run()
    return float(counter.get_total_flops())


def check_flops(model: PreTrainedModel, sizes: ModelSizes, ids_BP: torch.Tensor) -> float:
    """The relative difference between the two counts of a prefill, dense and model, whichever is larger.

    Raises:
        FlopMismatchError: above 0.1%.
    """
    batch, tokens = ids_BP.shape
    worst = 0.0
    for top_k in {sizes.shape.top_k, sizes.shape.num_experts}:
        active = sizes.with_top_k(top_k)
        path = _path_to_count(model) if active.routes else "auto"
        with _counting(model, top_k, path):
            counted = counted_flops(lambda: model(ids_BP, use_cache=False, logits_to_keep=1))
        run = sizes.shape.num_experts if path == "masked" else top_k
        expected = count_flops(active, tokens, batch=batch, core="full", experts_run=run).total
        difference = abs(counted - expected) / expected
        worst = max(worst, difference)
        if difference > TOLERANCE:
            raise FlopMismatchError(
                f"at top-k {top_k}, {tokens} tokens take {expected:.4g} FLOPs by factorctl's count "
                f"but {counted:.4g} by torch's, {difference:.2%} apart",
                "this model has matrix products that factorctl does not know of: please report it",
            )
    return worst


def _path_to_count(model: PreTrainedModel) -> PathName:
    return "grouped" if next(iter(factored_ffns(model))).serves_grouped else "masked"


@contextmanager
def _counting(model: PreTrainedModel, top_k: int, path: PathName | Literal["auto"]) -> Iterator[None]:
    """Eager attention and one path for every layer; all is put back afterwards."""
    attention = model.config._attn_implementation
    ffns = list(factored_ffns(model))
    before = [(ffn.top_k, ffn.path) for ffn in ffns]
    model.set_attn_implementation("eager")
    try:
        for ffn in ffns:
            ffn.top_k, ffn.path = top_k, path
        yield
    finally:
        model.set_attn_implementation(attention)
        for ffn, (old_top_k, old_path) in zip(ffns, before, strict=True):
            ffn.top_k, ffn.path = old_top_k, old_path
