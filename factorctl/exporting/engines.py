"""The engines that exports are for, and where one loads an export and computes something else without a word.

Which of them load an architecture, and what they do wrongly there, stands in the architecture's own file. docs/serve.md
says engine by engine what was run for this project and what was read in the engine's source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from factorctl.exporting.features import features_of
from factorctl.ffn.spec import FactoredSpec
from factorctl.models.families import DenseModel


class Engine(StrEnum):
    """What loads safetensors and generates, in the version that was looked at."""

    TRANSFORMERS = "transformers 5.23"
    VLLM = "vLLM 0.33"
    SGLANG = "SGLang 0.5.23"
    MLX = "mlx-lm 0.32"
    OPENVINO = "OpenVINO (optimum-intel 2.2)"
    MISTRAL_RS = "mistral.rs 0.9"
    ONNX = "ONNX Runtime GenAI 0.18"
    OLLAMA = "Ollama's import of safetensors"
    LLAMA_CPP_CONVERTER = "llama.cpp's own converter"


SERVERS = (Engine.TRANSFORMERS, Engine.VLLM, Engine.SGLANG)
"""What loads every architecture here."""


@dataclass(frozen=True)
class Served:
    """What of an export decides whether an engine computes what it should."""

    scales_rope: bool
    has_window: bool
    top_k: int
    is_sparse: bool
    tied: bool
    """Whether the head is the embedding and stands only once in the files."""


def as_served(dense: DenseModel, spec: FactoredSpec, *, untied: bool = False) -> Served:
    """What an engine makes its decisions on."""
    features, shape = features_of(dense), spec.shape
    return Served(
        scales_rope=features.rope_type != "default",
        has_window=features.window is not None,
        top_k=shape.top_k,
        is_sparse=shape.top_k < shape.num_experts,
        tied=bool(dense.config.tie_word_embeddings) and not untied,
    )


@dataclass(frozen=True)
class Flaw:
    """Where an engine loads an export and computes something else."""

    engine: Engine
    applies: Callable[[Served], bool]
    does: str
    is_silent: bool = True


MLX_ROPE = Flaw(Engine.MLX, lambda served: served.scales_rope, "takes no notice of rope_scaling")
MLX_WINDOW = Flaw(
    Engine.MLX,
    lambda served: served.has_window,
    "has no sliding window here: beyond it, it attends to everything before",
)
MISTRAL_RS_ROPE = Flaw(Engine.MISTRAL_RS, lambda served: served.scales_rope, "takes no notice of rope_scaling")
SGLANG_ROPE = Flaw(Engine.SGLANG, lambda served: served.scales_rope, "takes no notice of rope_scaling")
SGLANG_HEAD = Flaw(
    Engine.SGLANG,
    lambda served: served.tied,
    "does not tie the head to the embeddings: it would be left without values",
)
