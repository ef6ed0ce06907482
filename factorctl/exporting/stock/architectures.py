"""Which stock architecture holds a factored checkpoint, and what each target cannot hold, by field and value.

One row per architecture. Their routers are free of biases and give the chosen K gates that sum to one; they differ in
what stands around them. Sources, read unless marked as run: transformers 5.23 `models/*/modeling_*.py` (run), vLLM
`model_executor/models/*.py`, mlx-lm 0.32 `models/*.py` (run), llama.cpp `src/models/*.cpp` (run through xllamacpp).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from factorctl.config.export import Arch, ExportTarget
from factorctl.errors import UsageError
from factorctl.exporting.engines import Served, engines_that_run
from factorctl.exporting.features import Biases, Features, features_of
from factorctl.ffn.spec import FactoredSpec
from factorctl.models.families import DenseModel

SharedPlace = Literal["none", "own", "gated", "copied"]
"""Where shared neurons live: nowhere; in an ungated MLP of their own; in one behind a sigmoid gate (held at 1/2 by
zero weights, its down-projection doubled); or copied into every expert, which is exact because the gates sum to one."""


@dataclass(frozen=True)
class Architecture:
    """One stock mixture-of-experts architecture."""

    option: Arch
    model_type: str
    class_name: str
    shared: SharedPlace
    biases: Biases = "none"
    """The most attention biases that it can hold; what a source lacks of them is zero."""
    qk_norm: Literal["none", "optional", "always"] = "none"
    reads_head_dim: bool = False
    """Whether vLLM takes head_dim from the config; else it computes hidden_size / num_attention_heads."""
    has_window: bool = False
    """Whether it can attend within one sliding window in all layers."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """What of the router's logits is normalised over the K chosen ones."""
    counts_shared_experts: bool = False
    """Whether the shared MLP has to be as large as a whole number of experts."""
    ties_head: bool = True
    """Whether vLLM takes the embeddings for the head; else the head is always stored."""

    @property
    def is_granite(self) -> bool:
        return self.model_type.startswith("granite")


MIXTRAL = Architecture("mixtral", "mixtral", "MixtralForCausalLM", "none", reads_head_dim=True, has_window=True)
GRANITE = Architecture("granite-moe-shared", "granitemoeshared", "GraniteMoeSharedForCausalLM", "own")
HYBRID = Architecture(
    "granite-moe-hybrid", "granitemoehybrid", "GraniteMoeHybridForCausalLM", "own", biases="query-key-value-output"
)
QWEN2 = Architecture("qwen2-moe", "qwen2_moe", "Qwen2MoeForCausalLM", "gated", biases="query-key-value")
QWEN3 = Architecture("qwen3-moe", "qwen3_moe", "Qwen3MoeForCausalLM", "copied", qk_norm="always", reads_head_dim=True)
GLM4 = Architecture(
    "glm4-moe",
    "glm4_moe",
    "Glm4MoeForCausalLM",
    "own",
    biases="query-key-value",
    qk_norm="optional",
    reads_head_dim=True,
    scores="sigmoid",
    counts_shared_experts=True,
    ties_head=False,
)
ARCHITECTURES = (MIXTRAL, HYBRID, GRANITE, QWEN2, QWEN3, GLM4)

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


def architecture_for(dense: DenseModel, spec: FactoredSpec, arch: Arch = "auto") -> Architecture:
    """The stock transformers architecture to write; `blockers` says whether it fits.

    `auto` is the family's own, else of those for its split the one that most engines run right; where it does not fit,
    any other that does.
    """
    if arch != "auto":
        return next(row for row in ARCHITECTURES if row.option == arch)
    own = {"qwen2": (QWEN2,), "qwen3": (QWEN3,)}.get(dense.family.model_type)
    usual = own or ((HYBRID, GRANITE) if spec.shape.shared_size else (MIXTRAL,))
    features = features_of(dense)
    fitting = [row for row in usual if not _hf_blockers(row, spec, features)]
    fitting = fitting or [row for row in ARCHITECTURES if not _hf_blockers(row, spec, features)]
    if not fitting:
        return usual[0]
    return max(fitting, key=lambda row: len(engines_that_run(as_served(row, dense, spec))))


def as_served(arch: Architecture, dense: DenseModel, spec: FactoredSpec, *, untied: bool = False) -> Served:
    """What an engine makes its decisions on."""
    features = features_of(dense)
    return Served(
        model_type=arch.model_type,
        rope_type=features.rope_type,
        window=features.window,
        top_k=spec.shape.top_k,
        num_experts=spec.shape.num_experts,
        tied=bool(dense.config.tie_word_embeddings) and arch.ties_head and not untied,
    )


def gguf_architecture(dense: DenseModel, spec: FactoredSpec) -> str:
    """llama.cpp's `qwen2moe` never renormalises its gates: Qwen2 goes to `llama` or `granitemoe`, with q/k/v biases."""
    if dense.family.model_type == "qwen3":
        return "qwen3moe"
    return "granitemoe" if spec.shape.shared_size else "llama"


def refuse_blocked(
    dense: DenseModel, spec: FactoredSpec, target: ExportTarget, *, exact: bool, arch: Arch = "auto"
) -> None:
    """Refuse a target that cannot hold the model, naming field, value and the forms that can.

    Raises:
        UsageError: with every blocking field.
    """
    found = blockers(dense, spec, target, exact=exact, arch=arch)
    if not found:
        return
    named = f"--to {target}" if arch == "auto" else f"--arch {arch}"
    able = [name for name in get_args(ExportTarget) if not blockers(dense, spec, name, exact=exact)]
    others = [
        f"--arch {row.option}"
        for row in ARCHITECTURES
        if arch not in ("auto", row.option) and not blockers(dense, spec, target, exact=exact, arch=row.option)
    ]
    few_bits = "; few bits for engines: --to gguf --quant q8_0" if target[:3] == "bnb" and "gguf" in able else ""
    architectures = f"architectures that can: {', '.join(others)}; " if others else ""
    targets = f"targets that can: {', '.join('--to ' + name for name in able)}; the native checkpoint can as well"
    raise UsageError(
        f"{named} cannot hold this model: " + "; ".join(str(blocker) for blocker in found),
        f"{architectures}{targets}{few_bits}",
    )


def blockers(
    dense: DenseModel, spec: FactoredSpec, target: ExportTarget, *, exact: bool = False, arch: Arch = "auto"
) -> list[Blocker]:
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
    if target == "gguf":
        return found + _gguf_blockers(dense, spec, features)
    return found + _hf_blockers(architecture_for(dense, spec, arch), spec, features)


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


def _hf_blockers(arch: Architecture, spec: FactoredSpec, features: Features) -> list[Blocker]:
    return _attention_blockers(arch, features) + _routing_blockers(arch, spec)


def _attention_blockers(arch: Architecture, features: Features) -> list[Blocker]:
    found, name, most = [], arch.class_name, get_args(Biases)
    if most.index(features.biases) > most.index(arch.biases):
        field = "attention_bias" if features.biases == most[-1] else "q_proj.bias"
        found.append(Blocker(field, True, f"engines would drop biases silently, which {name} has no place for"))
    if features.rope_type not in HF_ROPE_TYPES:
        found.append(Blocker("rope_type", features.rope_type, f"known here: {', '.join(sorted(HF_ROPE_TYPES))}"))
    if not arch.reads_head_dim and features.head_dim != features.usual_head_dim:
        reason = f"vLLM's {name} assumes hidden_size / num_attention_heads = {features.usual_head_dim}"
        found.append(Blocker("head_dim", features.head_dim, reason))
    if features.window and not (arch.has_window and features.window_everywhere):
        found.append(Blocker("sliding_window", features.window, f"{name} attends to everything before"))
    if features.qk_norm and arch.qk_norm == "none":
        found.append(Blocker("qk_norm", True, f"{name} does not normalise queries and keys, as this model does"))
    if not features.qk_norm and arch.qk_norm == "always":
        found.append(Blocker("qk_norm", False, f"{name} normalises queries and keys, which this model does not"))
    return found


def _routing_blockers(arch: Architecture, spec: FactoredSpec) -> list[Blocker]:
    found, shape, name = [], spec.shape, arch.class_name
    if arch.shared == "none" and shape.shared_size:
        found.append(Blocker("shared_size", shape.shared_size, f"{name} has no neurons that are always on"))
    if arch.scores == "sigmoid" and spec.gate == "softmax" and 1 < shape.top_k < shape.num_experts:
        reason = f"{name} weighs {shape.top_k} of {shape.num_experts} experts by sigmoids, which no softmax equals"
        found.append(Blocker("gate", spec.gate, reason))
    return found


def _gguf_blockers(dense: DenseModel, spec: FactoredSpec, features: Features) -> list[Blocker]:
    arch, rope_type, found = gguf_architecture(dense, spec), features.rope_type, []
    if features.biases == "query-key-value-output" and arch == "qwen3moe":
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
        return spec.shape.routes
    return target != "dense"


def needs_router_scaling(spec: FactoredSpec) -> bool:
    """Gate `hard` over several of the experts: a stock router comes near it when its logits are made small."""
    return spec.gate == "hard" and 1 < spec.shape.top_k < spec.shape.num_experts
