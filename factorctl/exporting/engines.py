"""Which engines run which stock architecture, and where one computes something else without a word.

docs/serve.md says engine by engine what was run for this project and what was read in the engine's source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Served:
    """What of an export decides whether an engine computes what it should."""

    model_type: str
    rope_type: str
    window: int | None
    top_k: int
    num_experts: int
    tied: bool
    """Whether the head is the embedding and stands only once in the files."""

    @property
    def scales_rope(self) -> bool:
        return self.rope_type != "default"

    @property
    def is_sparse(self) -> bool:
        return self.top_k < self.num_experts


LOADS: Mapping[str, frozenset[str]] = {
    "transformers 5.23": frozenset(
        {"mixtral", "granitemoeshared", "granitemoehybrid", "qwen2_moe", "qwen3_moe", "glm4_moe"}
    ),
    "vLLM 0.33": frozenset({"mixtral", "granitemoeshared", "granitemoehybrid", "qwen2_moe", "qwen3_moe", "glm4_moe"}),
    "SGLang 0.5.23": frozenset(
        {"mixtral", "granitemoeshared", "granitemoehybrid", "qwen2_moe", "qwen3_moe", "glm4_moe"}
    ),
    "mlx-lm 0.32": frozenset({"mixtral", "granitemoehybrid", "qwen2_moe", "qwen3_moe", "glm4_moe"}),
    "OpenVINO (optimum-intel 2.2)": frozenset({"mixtral", "granitemoehybrid", "qwen2_moe", "qwen3_moe"}),
    "mistral.rs 0.9": frozenset({"mixtral", "qwen3_moe"}),
    "ONNX Runtime GenAI 0.18": frozenset({"granitemoehybrid"}),
    "Ollama's import of safetensors": frozenset({"mixtral"}),
    "llama.cpp's own converter": frozenset({"mixtral", "granitemoeshared", "qwen2_moe", "qwen3_moe"}),
}
"""Engine -> the `model_type`s that it loads and generates with."""


@dataclass(frozen=True)
class Flaw:
    """Where an engine loads an export and computes something else."""

    engine: str
    applies: Callable[[Served], bool]
    does: str
    is_silent: bool = True


FLAWS = (
    Flaw(
        "mlx-lm 0.32",
        lambda served: served.model_type == "qwen2_moe" and served.is_sparse,
        "takes no notice of norm_topk_prob: the gates of the chosen experts do not sum to one",
    ),
    Flaw(
        "mlx-lm 0.32",
        lambda served: served.model_type == "qwen2_moe" and served.scales_rope,
        "refuses rope_scaling",
        is_silent=False,
    ),
    Flaw(
        "mlx-lm 0.32",
        lambda served: served.model_type != "qwen2_moe" and served.scales_rope,
        "takes no notice of rope_scaling",
    ),
    Flaw(
        "mlx-lm 0.32",
        lambda served: served.model_type == "glm4_moe" and served.top_k == 1,
        "leaves the gate of a single expert as its sigmoid, where norm_topk_prob makes it one",
    ),
    Flaw(
        "mlx-lm 0.32",
        lambda served: served.window is not None,
        "has no sliding window here: beyond it, it attends to everything before",
    ),
    Flaw("mistral.rs 0.9", lambda served: served.scales_rope, "takes no notice of rope_scaling"),
    Flaw(
        "SGLang 0.5.23",
        lambda served: served.model_type in ("mixtral", "granitemoeshared") and served.scales_rope,
        "takes no notice of rope_scaling",
    ),
    Flaw(
        "SGLang 0.5.23",
        lambda served: served.model_type in ("mixtral", "qwen2_moe", "qwen3_moe") and served.tied,
        "does not tie the head to the embeddings: it would be left without values",
    ),
    Flaw(
        "ONNX Runtime GenAI 0.18",
        lambda served: served.model_type == "granitemoehybrid",
        "builds the shared neurons alone and drops every routed expert",
    ),
    Flaw(
        "Ollama's import of safetensors",
        lambda served: served.model_type == "mixtral",
        "exchanges two of Mixtral's expert matrices",
    ),
    Flaw(
        "llama.cpp's own converter",
        lambda served: served.model_type == "qwen2_moe",
        "makes a file whose gates are not normalised and whose shared expert, its gate being zero, gives NaN",
    ),
)


def flaws(served: Served) -> list[Flaw]:
    """Every engine that loads this export and does not compute what it should."""
    return [flaw for flaw in FLAWS if served.model_type in LOADS[flaw.engine] and flaw.applies(served)]


def engines_that_run(served: Served) -> list[str]:
    """The engines that load this export and compute what they should."""
    wrong = {flaw.engine for flaw in flaws(served)}
    return [engine for engine, loaded in LOADS.items() if served.model_type in loaded and engine not in wrong]
