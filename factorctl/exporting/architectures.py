"""Which stock architecture holds a factored checkpoint, and what each target cannot hold, by field and value.

One row per architecture. All of them compute `softmax over the chosen K of a bias-free router`; they differ in what
stands around it. Sources, read unless marked as run: transformers 5.23 `models/*/modeling_*.py` (run), vLLM
`model_executor/models/*.py`, llama.cpp `src/models/*.cpp` (run through xllamacpp).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from factorctl.config import ExportTarget
from factorctl.errors import UsageError
from factorctl.exporting.features import Features, features_of
from factorctl.models.factored_spec import FactoredSpec
from factorctl.models.families import DenseModel

SharedPlace = Literal["none", "own", "gated", "copied"]
"""Where shared neurons live: nowhere; in an ungated MLP of their own; in one behind a sigmoid gate (held at 1/2 by
zero weights, its down-projection doubled); or copied into every expert, which is exact because the gates sum to one."""


@dataclass(frozen=True)
class Architecture:
    """One stock mixture-of-experts architecture."""

    model_type: str
    class_name: str
    shared: SharedPlace
    reads_head_dim: bool
    """Whether vLLM takes head_dim from the config; else it computes hidden_size / num_attention_heads."""
    has_window: bool
    """Whether it can attend within one sliding window in all layers."""


MIXTRAL = Architecture("mixtral", "MixtralForCausalLM", "none", reads_head_dim=True, has_window=True)
GRANITE = Architecture("granitemoeshared", "GraniteMoeSharedForCausalLM", "own", reads_head_dim=False, has_window=False)
QWEN2 = Architecture("qwen2_moe", "Qwen2MoeForCausalLM", "gated", reads_head_dim=False, has_window=False)
QWEN3 = Architecture("qwen3_moe", "Qwen3MoeForCausalLM", "copied", reads_head_dim=True, has_window=False)

HF_ROPE_TYPES = frozenset({"default", "linear", "dynamic", "yarn", "llama3"})
GGUF_ROPE_TYPES = frozenset({"default", "linear", "llama3"})
LLAMA_CPP_MAX_LAYERS = 512


@dataclass(frozen=True)
class Blocker:
    """A value that a target cannot hold."""

    field: str
    value: object
    reason: str

    def __str__(self) -> str:
        return f"{self.field} = {self.value!r}: {self.reason}"


def architecture_for(dense: DenseModel, spec: FactoredSpec) -> Architecture:
    """The stock transformers architecture of a family that has one; `blockers` says whether it fits."""
    if dense.family.model_type == "qwen2":
        return QWEN2
    if dense.family.model_type == "qwen3":
        return QWEN3
    return GRANITE if spec.shape.shared_size else MIXTRAL


def gguf_architecture(dense: DenseModel, spec: FactoredSpec) -> str:
    """llama.cpp's `qwen2moe` never renormalises its gates: Qwen2 goes to `llama` or `granitemoe`, with q/k/v biases."""
    if dense.family.model_type == "qwen3":
        return "qwen3moe"
    return "granitemoe" if spec.shape.shared_size else "llama"


def refuse_blocked(dense: DenseModel, spec: FactoredSpec, target: ExportTarget, *, exact: bool) -> None:
    """Refuse a target that cannot hold the model, naming field, value and the targets that can.

    Raises:
        UsageError: with every blocking field.
    """
    found = blockers(dense, spec, target, exact=exact)
    if not found:
        return
    able = [name for name in get_args(ExportTarget) if not blockers(dense, spec, name, exact=exact)]
    few_bits = "; few bits for engines: --to gguf --quant q8_0" if target[:3] == "bnb" and "gguf" in able else ""
    raise UsageError(
        f"--to {target} cannot hold this model: " + "; ".join(str(blocker) for blocker in found),
        f"targets that can: {', '.join('--to ' + name for name in able)}; the native checkpoint can as well{few_bits}",
    )


def blockers(dense: DenseModel, spec: FactoredSpec, target: ExportTarget, *, exact: bool = False) -> list[Blocker]:
    """What stands in the way of `target`; empty means that it can be written."""
    if not becomes_mixture(target, spec):
        return _dense_4bit_blockers(dense, spec) if target == "bnb-4bit" else []
    if spec.shape.top_k == 0:
        return [Blocker("top_k", 0, "no expert ever runs, which is a dense model of the shared neurons")]
    if dense.family.model_type.startswith("gemma"):
        reason = "its gelu and its norms, which scale by 1 + w, fit no stock mixture of experts"
        return [Blocker("model_type", dense.family.model_type, reason)]
    features = features_of(dense)
    found = _common_blockers(features, spec, exact=exact)
    return found + (_gguf_blockers if target == "gguf" else _hf_blockers)(dense, spec, features)


def _common_blockers(features: Features, spec: FactoredSpec, *, exact: bool) -> list[Blocker]:
    found = []
    if features.activation != "silu":
        found.append(
            Blocker("hidden_act", features.activation, "vLLM, SGLang and llama.cpp run experts with silu only")
        )
    if features.ffn_bias:
        found.append(Blocker("mlp_bias", True, "the experts of stock architectures have no biases"))
    if features.partial_rotary_factor != 1:
        reason = "stock targets rotate whole heads"
        found.append(Blocker("partial_rotary_factor", features.partial_rotary_factor, reason))
    if exact and needs_router_scaling(spec):
        reason = f"counts each of the {spec.shape.top_k} experts fully; stock routers weigh them, so --exact forbids it"
        found.append(Blocker("gate", "hard", reason))
    return found


def _hf_blockers(dense: DenseModel, spec: FactoredSpec, features: Features) -> list[Blocker]:
    arch, found = architecture_for(dense, spec), []
    if features.attention_bias:
        found.append(Blocker("attention_bias", True, f"vLLM's {arch.class_name} would drop biases silently"))
    if features.rope_type not in HF_ROPE_TYPES:
        found.append(Blocker("rope_type", features.rope_type, f"known here: {', '.join(sorted(HF_ROPE_TYPES))}"))
    if not arch.reads_head_dim and features.head_dim != features.usual_head_dim:
        reason = f"vLLM's {arch.class_name} assumes hidden_size / num_attention_heads = {features.usual_head_dim}"
        found.append(Blocker("head_dim", features.head_dim, reason))
    if features.window and not (arch.has_window and features.window_everywhere):
        found.append(Blocker("sliding_window", features.window, f"{arch.class_name} attends to everything before"))
    return found


def _gguf_blockers(dense: DenseModel, spec: FactoredSpec, features: Features) -> list[Blocker]:
    arch, rope_type, found = gguf_architecture(dense, spec), features.rope_type, []
    if features.attention_bias and arch == "qwen3moe":
        reason = "llama.cpp's qwen3moe has no bias on attention's output, and does not load a file with one"
        found.append(Blocker("attention_bias", True, reason))
    if rope_type not in GGUF_ROPE_TYPES:
        found.append(Blocker("rope_type", rope_type, f"known here: {', '.join(sorted(GGUF_ROPE_TYPES))}"))
    elif rope_type == "llama3" and arch == "qwen3moe":
        found.append(Blocker("rope_type", rope_type, "llama.cpp's qwen3moe reads no rope_freqs"))
    if dense.num_layers > LLAMA_CPP_MAX_LAYERS:
        reason = f"llama.cpp stops above {LLAMA_CPP_MAX_LAYERS}"
        found.append(Blocker("num_hidden_layers", dense.num_layers, reason))
    return found


def _dense_4bit_blockers(dense: DenseModel, spec: FactoredSpec) -> list[Blocker]:
    """What bitsandbytes 0.50's 4-bit linear layers miscalculate on a CPU, or refuse where it knows AVX512-BF16."""
    features = features_of(dense)
    ffn = (
        ("shared_size", spec.shape.shared_size)
        if spec.shape.top_k == 0
        else ("intermediate_size", dense.intermediate_size)
    )
    rows = [
        ("hidden_size", dense.hidden_size),
        ("num_attention_heads * head_dim", features.num_heads * features.head_dim),
    ]
    reason = "bitsandbytes computes 4-bit layers wrongly on CPUs where a row is no multiple of 64 weights"
    return [Blocker(field, size, reason) for field, size in (*rows, ffn) if size % 64]


def becomes_mixture(target: ExportTarget, spec: FactoredSpec) -> bool:
    """Whether the target is a stock mixture of experts; bitsandbytes' are dense where nothing is routed."""
    if target in ("bnb-4bit", "bnb-8bit"):
        return 0 < spec.shape.top_k < spec.shape.num_experts
    return target != "dense"


def needs_router_scaling(spec: FactoredSpec) -> bool:
    """Gate `hard` over several of the experts: a stock router comes near it when its logits are made small."""
    return spec.gate == "hard" and 1 < spec.shape.top_k < spec.shape.num_experts
