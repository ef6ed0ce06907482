"""Rotary embeddings as a GGUF file states them -> `rope_parameters` of transformers.

Sources: llama.cpp `src/llama-model.cpp` (the keys, and the type `linear` where none is named), `conversion/llama.py`
(how `rope_freqs` is made), transformers `modeling_rope_utils.py`.
"""

from __future__ import annotations

import numpy as np

from factorctl.checkpoint.gguf.header import GIVE_HF, GgufHeader
from factorctl.checkpoint.gguf.keys import Hyperparameters
from factorctl.errors import UsageError

ROPE_FREQS = "rope_freqs.weight"
_AGREEMENT = 2e-5
"""Relative difference of frequency factors that is rounding: they are stored in float32."""


def rope_parameters(header: GgufHeader, keys: Hyperparameters, *, head_dim: int) -> dict[str, object]:
    """The `rope_parameters` that this file's graph in llama.cpp computes.

    Raises:
        UsageError: naming the key or tensor that cannot be carried.
    """
    rotated = keys.integer("rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise UsageError(
            f"{header.path} rotates {rotated} of the {head_dim} values of a head "
            f"({keys.name('rope.dimension_count')}); only whole heads are read",
            GIVE_HF,
        )
    theta = keys.number("rope.freq_base", 10000.0)
    scaling = _scaling(header, keys)
    if ROPE_FREQS not in header.tensors:
        return {"rope_theta": theta, **scaling}
    if scaling["rope_type"] != "default":
        raise UsageError(
            f"{header.path} scales RoPE twice: by {keys.name('rope.scaling.type')} and by the tensor {ROPE_FREQS}",
            GIVE_HF,
        )
    factors = header.tensors[ROPE_FREQS].dequantised().astype(np.float64).reshape(-1)
    fitted = llama3_parameters(factors, theta)
    if fitted is None:
        raise UsageError(
            f"{header.path}: the factors in {ROPE_FREQS} are not those of Llama 3's scaling, and no other is known",
            GIVE_HF,
        )
    return {"rope_theta": theta, **fitted}


def _scaling(header: GgufHeader, keys: Hyperparameters) -> dict[str, object]:
    """`rope_type` and what it needs, from the keys alone; llama.cpp reads a factor without a type as `linear`."""
    old = keys.number("rope.scale_linear", 0.0)
    factor = keys.number("rope.scaling.factor", 0.0) or old
    kind = keys.text("rope.scaling.type", "linear" if factor else "none")
    context = keys.integer("rope.scaling.original_context_length", 0)
    keys.pass_over("rope.scaling.finetuned")
    keys.expect("rope.scaling.attn_factor", 1.0)
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and factor > 1 and context:
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": context}
    raise UsageError(
        f"{header.path} scales RoPE by {keys.name('rope.scaling.type')} = {kind!r}, factor {factor:g}, original "
        f"context {context}, which is not read from GGUF files",
        GIVE_HF,
    )


def llama3_parameters(factors: np.ndarray, theta: float) -> dict[str, object] | None:
    """The parameters of rope_type `llama3` that give these divisors of the frequencies [head_dim / 2], else None.

    Short wavelengths keep their frequency, long ones are divided by `factor`, and those between are blended by a share
    that is linear in the frequency. A line has two parameters and llama3 three (low, high, context): low is taken as 1,
    which every Llama has, and the same frequencies follow.
    """
    if len(factors) < 2 or not np.all(np.isfinite(factors)) or factors.min() < 1 - _AGREEMENT:
        return None
    if factors.max() < 1 + _AGREEMENT:
        return {"rope_type": "default"}
    factor = float(factors.max())
    frequencies = theta ** (-np.arange(len(factors)) / len(factors)) / (2 * np.pi)
    kept = (1 / factors - 1 / factor) / (1 - 1 / factor)
    blended = (kept > 1e-4) & (kept < 1 - 1e-4)
    for slope, offset in _lines(frequencies, kept, blended):
        parameters = _snapped(factor, slope, offset)
        if parameters is not None and np.allclose(_factors(parameters, frequencies), factors, rtol=_AGREEMENT):
            return {"rope_type": "llama3", **parameters}
    return None


def _lines(frequencies: np.ndarray, kept: np.ndarray, blended: np.ndarray) -> list[tuple[float, float]]:
    """Candidates for kept = slope * frequency - offset."""
    usual = 1 / 3  # low 1, high 4
    if blended.sum() >= 2:
        slope, negative = np.polyfit(frequencies[blended], kept[blended], 1)
        return [(float(slope), float(-negative))]
    if blended.sum() == 1:
        return [(float((kept[blended][0] + usual) / frequencies[blended][0]), usual)]
    contexts = 2.0 ** np.arange(5, 24)  # a step: any line that falls within it will do
    return [(float(context / 3), usual) for context in contexts]


def _snapped(factor: float, slope: float, offset: float) -> dict[str, float | int] | None:
    """Parameters with low_freq_factor 1 and numbers as people write them."""
    if slope <= 0 or offset <= 0:
        return None
    high = 1 + 1 / offset
    return {
        "factor": round(factor, 3),
        "low_freq_factor": 1.0,
        "high_freq_factor": round(high, 3),
        "original_max_position_embeddings": round(slope / offset),
    }


def _factors(parameters: dict[str, float | int], frequencies: np.ndarray) -> np.ndarray:
    """The divisors that these parameters give."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    share = (parameters["original_max_position_embeddings"] * frequencies - low) / (high - low)
    kept = np.clip(share, 0, 1)
    return np.asarray(1 / ((1 - kept) / parameters["factor"] + kept))
