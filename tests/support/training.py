"""A tiny model as it is while it is trained: teacher and student in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support.tiny import some_ids

import factorctl
from factorctl.checkpoint.reader import CheckpointReader
from factorctl.models.building import decoder_layers, factored_ffns
from factorctl.models.families import read_dense_model
from factorctl.training.distiller import Distiller
from factorctl.training.optimizers import choose_trained
from factorctl.training.presets import LossWeights
from factorctl.training.teacher import dense_tensors, own_tensors, teacher_ffn
from factorctl.training.twin_ffn import TwinFFN, TwinOptions

ALL = LossWeights(lm=1.0, par=0.1, kd=1.0, mse=0.5, balance=0.01, z=0.001)
LENGTH = 24


def distiller(
    path: Path,
    weights: LossWeights = ALL,
    *,
    top_k: int | None = None,
    train: Any = "all",
    dtype: torch.dtype = torch.float32,
    source: Path | None = None,
    **options: Any,
) -> Distiller:
    model = factorctl.load(path, top_k=top_k, dtype=torch.float32)
    choose_trained(factored_ffns(model), train, weights)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    shared = TwinOptions(weights, None, dtype, **{"learns_sharpness": True, **options})
    for layer, block in enumerate(decoder_layers(model)):
        student = block.mlp
        student.router.data = student.router.data.float()
        tensors = own_tensors(student)
        if source is not None:
            tensors = dense_tensors(student, read_dense_model(source).read_ffn(layer, CheckpointReader(source).read))
        block.mlp = TwinFFN(student, teacher_ffn(student, tensors, "none", dtype), shared)
    return Distiller(model, shared, 1.0)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return some_ids(2, LENGTH), torch.arange(LENGTH).repeat(2, 1)
