"""Reading a GGUF file back: every tensor is there, holds what it was meant to hold, and no other is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader

from factorctl.checkpoint.reader import CheckpointReader
from factorctl.errors import FactorctlError
from factorctl.exporting.gguf.llama_quantizer import MIXED
from factorctl.exporting.gguf.tensors import GgufLayout, storage_type, to_numpy

_Q = GGMLQuantizationType
PLAIN = (_Q.F32, _Q.F16, _Q.BF16)
LARGEST_ERROR = {
    _Q.Q8_0: 0.02,
    _Q.Q6_K: 0.05,
    _Q.Q5_K: 0.1,
    _Q.Q5_1: 0.1,
    _Q.Q5_0: 0.1,
    _Q.Q4_K: 0.2,
    _Q.Q4_1: 0.2,
    _Q.Q4_0: 0.2,
    _Q.IQ4_NL: 0.2,
    _Q.Q3_K: 0.4,
    _Q.Q2_K: 0.7,
}
"""Of a matrix as llama.cpp quantised it: norm of the error over norm of the weights. Another matrix gives 1.4."""


class GgufMismatchError(FactorctlError):
    """The file that was written does not hold what was meant to be in it."""


def check_gguf(path: Path, layout: GgufLayout, reader: CheckpointReader, quant: str) -> float:
    """Compare the file with the form it was made of, layer by layer.

    Returns:
        Bits per weight, over all tensors.

    Raises:
        GgufMismatchError: naming the first difference.
    """
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    weights = sum(int(tensor.n_elements) for tensor in stored.values())
    bits = 8 * sum(int(tensor.n_bytes) for tensor in stored.values())
    for unit in range(layout.num_units):
        for name, tensor in layout.unit(unit, reader.read).items():
            found = stored.pop(name, None)
            if found is None or [int(size) for size in reversed(found.shape)] != list(tensor.shape):
                raise GgufMismatchError(
                    f"{path.name} lacks tensor {name} of {list(tensor.shape)}", "nothing was published"
                )
            wrong = _mixed_fault(found, tensor) if quant in MIXED else _fault(found, tensor, quant)
            if wrong:
                raise GgufMismatchError(f"{path.name}: tensor {name} {wrong}", "nothing was published")
    if stored:
        raise GgufMismatchError(f"{path.name} holds tensor {next(iter(stored))}, which was not meant to be there")
    return bits / weights


def _fault(found: Any, tensor: torch.Tensor, quant: str) -> str | None:
    kind = storage_type(found.name, tensor.shape, quant)
    if found.tensor_type is not kind:
        return f"is {found.tensor_type.name}, not {kind.name}"
    return None if _equals(found, tensor, kind) else "was not stored whole"


def _mixed_fault(found: Any, tensor: torch.Tensor) -> str | None:
    """llama.cpp chose the type: every matrix of it, each expert by itself, is near what it stands for."""
    kind = found.tensor_type
    if kind in PLAIN:
        return None if _equals(found, tensor, kind) else "was not stored whole"
    if kind not in LARGEST_ERROR:
        return f"is {kind.name}, which no mixture here has"
    held = torch.from_numpy(gguf.dequantize(found.data, kind)).reshape(tensor.shape)
    meant = tensor.float()
    error = (held - meant).flatten(-2).norm(dim=-1) / meant.flatten(-2).norm(dim=-1).clamp_min(1e-30)
    largest = float(error.max())
    if not largest <= LARGEST_ERROR[kind]:
        return f"is off by {largest:.2g} of its norm as {kind.name}, which may be {LARGEST_ERROR[kind]:g}"
    return None


def _equals(found: Any, tensor: torch.Tensor, kind: GGMLQuantizationType) -> bool:
    return bool(np.array_equal(found.data.reshape(-1), gguf.quantize(to_numpy(tensor), kind).reshape(-1)))
