"""The tensors of a GGUF file under transformers' names, shapes and layouts, every one of them accounted for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from factorctl.checkpoint.gguf.families import REST, GgufFamily
from factorctl.checkpoint.gguf.header import GIVE_HF, GgufHeader
from factorctl.checkpoint.gguf.rope import ROPE_FREQS
from factorctl.checkpoint.reader import all_finite
from factorctl.errors import IntegrityError, UsageError


@dataclass(frozen=True)
class GgufWeights:
    """Where each tensor that the model has comes from; None is a bias that the file leaves out, and is zero."""

    header: GgufHeader
    family: GgufFamily
    config: Any
    shapes: Mapping[str, tuple[int, ...]]
    stored_as: Mapping[str, str | None]

    @property
    def num_units(self) -> int:
        return int(self.config.num_hidden_layers) + 1

    @property
    def num_bytes(self) -> int:
        """Of all tensors in float32."""
        return 4 * sum(math.prod(shape) for shape in self.shapes.values())

    def units(self) -> Iterator[dict[str, torch.Tensor]]:
        """The tensors outside of the layers, then those of one layer after the other, in float32."""
        prefixes = [f"model.layers.{layer}." for layer in range(self.config.num_hidden_layers)]
        yield {name: self.read(name) for name in self.shapes if not name.startswith("model.layers.")}
        for prefix in prefixes:
            yield {name: self.read(name) for name in self.shapes if name.startswith(prefix)}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, dequantised.

        Raises:
            IntegrityError: it holds NaN or Inf.
        """
        stored = self.stored_as[name]
        if stored is None:
            return torch.zeros(self.shapes[name])
        values = self.header.tensors[stored].dequantised()
        if self.family.raised_norms and name.endswith("norm.weight"):
            values = values - np.float32(1)
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        if self.family.interleaved and (count := heads.get(name.split(".")[-2])):
            values = _half_by_half(values, count)
        tensor = torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
        if not all_finite(tensor):
            raise IntegrityError(
                f"tensor {stored} in {self.header.path} holds NaN or Inf", "the source is damaged: fetch it again"
            )
        return tensor


def account_for_tensors(
    header: GgufHeader, family: GgufFamily, config: Any, shapes: Mapping[str, tuple[int, ...]]
) -> GgufWeights:
    """Pair the tensors of the file with those of the model, in both directions.

    Args:
        shapes: name -> shape of what the model must have, tied weights once.

    Raises:
        IntegrityError: the file lacks a tensor, or one has another shape.
        UsageError: the file holds a tensor that the model has no place for.
    """
    stored_as: dict[str, str | None] = {}
    for name, shape in shapes.items():
        stored = _stored_name(name, family)
        if stored not in header.tensors:
            if family.optional_biases and name.endswith(".bias"):
                stored_as[name] = None
                continue
            raise IntegrityError(f"{header.path} lacks tensor {stored}", "fetch the file again")
        if header.tensors[stored].shape != shape:
            raise IntegrityError(
                f"{header.path}: tensor {stored} has shape {header.tensors[stored].shape}; its keys say {shape}",
                "fetch the file again",
            )
        stored_as[name] = stored
    left = sorted(header.tensors.keys() - set(stored_as.values()) - {ROPE_FREQS})
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise UsageError(
            f"{header.path} holds tensor {left[0]}{more}, which transformers' {family.model_type} has no place for",
            GIVE_HF,
        )
    return GgufWeights(header, family, config, shapes, stored_as)


def _stored_name(name: str, family: GgufFamily) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{REST.get(stem, stem)}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{family.layer.get(part, part)}.{kind}"


def _half_by_half(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from neighbouring pairs, as llama.cpp rotates them, to halves, as transformers does."""
    rows = values.shape[0] // heads
    return values.reshape(heads, rows // 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
