"""The native model's values as an export stores them: rounded to its dtype, under their native names.

A native model of these values is what an export has to equal to the last digits, however coarsely it was rounded. What
the rounding does to the native model is another question, and asked apart.
"""

from __future__ import annotations

import dataclasses

import torch

from factorctl.exporting.forms import cast_to
from factorctl.exporting.jobs import ExportJob
from factorctl.exporting.stock.choice import becomes_mixture
from factorctl.exporting.stock.folding import folded_scale
from factorctl.ffn.spec import FactoredSpec
from factorctl.models.families import ReadTensor, ffn_prefix


def exported_spec(job: ExportJob) -> FactoredSpec:
    """The factored model that the export is one of: a stock router's gate is a softmax; a dense form runs all."""
    spec = job.checkpoint.spec
    if becomes_mixture(job.config.target, spec):
        return dataclasses.replace(spec, gate="softmax")
    return spec.with_top_k(job.form.top_k)


def stored_values(job: ExportJob) -> ReadTensor:
    """Reads what `--dtype`, the folded scale and a hard gate's shift of the routers leave of each native tensor."""
    dtype, spec, layers = cast_to(job.config), job.checkpoint.spec, range(job.checkpoint.dense.num_layers)
    is_mixture = becomes_mixture(job.config.target, spec)
    downs = {f"{ffn_prefix(layer)}.down": layer for layer in layers} if is_mixture else {}
    routers = {f"{ffn_prefix(layer)}.router": shift for layer, shift in enumerate(job.shifts)}

    def read(name: str) -> torch.Tensor:
        tensor = job.reader.read(name)
        if not tensor.is_floating_point():
            return tensor
        stored = dtype or tensor.dtype
        if name in downs:
            shared, scale = spec.shape.shared_size, folded_scale(spec, downs[name])
            routed = (tensor[:, shared:].double() * scale).to(stored).double() / scale
            return torch.cat([tensor[:, :shared].to(stored).double(), routed], dim=1)
        return (tensor.double() * 2.0 ** -routers.get(name, 0)).to(stored)

    return read
