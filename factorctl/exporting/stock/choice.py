"""Which stock architecture holds a factored checkpoint, and what each target cannot hold, by field and value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from factorctl.config.export import ExportTarget
from factorctl.errors import UsageError, did_you_mean
from factorctl.exporting.engines import as_served
from factorctl.exporting.features import Biases, Features, features_of
from factorctl.exporting.stock.architecture import Architecture, GgufGraph
from factorctl.exporting.stock.architectures import architectures
from factorctl.ffn.spec import FactoredSpec
from factorctl.models.families import DenseModel

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


def architecture_for(dense: DenseModel, spec: FactoredSpec, arch: str = "auto") -> Architecture:
    """The stock transformers architecture to write; `blockers` says whether it fits.

    `auto` is the family's own, else of those for its split the one that most engines run right; where it does not fit,
    any other that does.

    Raises:
        UsageError: there is no such `arch`.
    """
    if arch != "auto":
        return _named(arch)
    usual, features = _usual(architectures(), dense, spec), features_of(dense)
    fitting = [row for row in usual if not _hf_blockers(row, spec, features)]
    fitting = fitting or [row for row in architectures() if not _hf_blockers(row, spec, features)]
    served = as_served(dense, spec)
    return max(fitting or usual, key=lambda row: len(row.engines_that_run(served)))


def _named(option: str) -> Architecture:
    rows = {row.option: row for row in architectures()}
    if option not in rows:
        raise UsageError(f"--arch {option} is not known", did_you_mean(option, ["auto", *rows]))
    return rows[option]


def gguf_architecture(dense: DenseModel, spec: FactoredSpec) -> Architecture:
    """The architecture whose graph a GGUF takes: the family's own, else the first for its split."""
    with_graph = [row for row in architectures() if row.gguf is not None]
    return _usual(with_graph, dense, spec)[0]


def graph_of(arch: Architecture) -> GgufGraph:
    """The graph of an architecture that has one."""
    assert arch.gguf is not None
    return arch.gguf


def _usual(rows: Sequence[Architecture], dense: DenseModel, spec: FactoredSpec) -> list[Architecture]:
    """The family's own, else those with a place for shared neurons where there are some, and without where not."""
    own = [row for row in rows if dense.family.model_type in row.families]
    place = "own" if spec.shape.shared_size else "none"
    return own or [row for row in rows if row.shared == place and not row.families]


def refuse_blocked(
    dense: DenseModel, spec: FactoredSpec, target: ExportTarget, *, exact: bool, arch: str = "auto"
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
        for row in architectures()
        if arch not in ("auto", row.option) and not blockers(dense, spec, target, exact=exact, arch=row.option)
    ]
    few_bits = "; few bits for engines: --to gguf --quant q8_0" if target[:3] == "bnb" and "gguf" in able else ""
    rows = f"architectures that can: {', '.join(others)}; " if others else ""
    targets = f"targets that can: {', '.join('--to ' + name for name in able)}; the native checkpoint can as well"
    raise UsageError(
        f"{named} cannot hold this model: " + "; ".join(str(blocker) for blocker in found),
        f"{rows}{targets}{few_bits}",
    )


def blockers(
    dense: DenseModel, spec: FactoredSpec, target: ExportTarget, *, exact: bool = False, arch: str = "auto"
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
    found, name = [], arch.class_name
    if _has_more_biases(features.biases, arch.biases):
        reason = f"engines would drop biases silently, which {name} has no place for"
        found.append(Blocker(_bias_field(features.biases), True, reason))
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


def _has_more_biases(these: Biases, held: Biases) -> bool:
    amounts = get_args(Biases)
    return bool(amounts.index(these) > amounts.index(held))


def _bias_field(biases: Biases) -> str:
    return "attention_bias" if biases == "query-key-value-output" else "q_proj.bias"


def _routing_blockers(arch: Architecture, spec: FactoredSpec) -> list[Blocker]:
    found, shape, name = [], spec.shape, arch.class_name
    if arch.shared == "none" and shape.shared_size:
        found.append(Blocker("shared_size", shape.shared_size, f"{name} has no neurons that are always on"))
    if arch.scores == "sigmoid" and spec.gate == "softmax" and 1 < shape.top_k < shape.num_experts:
        reason = f"{name} weighs {shape.top_k} of {shape.num_experts} experts by sigmoids, which no softmax equals"
        found.append(Blocker("gate", spec.gate, reason))
    return found


def _gguf_blockers(dense: DenseModel, spec: FactoredSpec, features: Features) -> list[Blocker]:
    graph, rope_type, found = graph_of(gguf_architecture(dense, spec)), features.rope_type, []
    if _has_more_biases(features.biases, graph.biases):
        where = "on attention's output" if graph.biases != "none" else "in attention"
        reason = f"llama.cpp's {graph.name} has no bias {where}, and does not load a file with one"
        found.append(Blocker(_bias_field(features.biases), True, reason))
    if rope_type not in GGUF_ROPE_TYPES:
        found.append(Blocker("rope_type", rope_type, f"known here: {', '.join(sorted(GGUF_ROPE_TYPES))}"))
    elif rope_type == "llama3" and not graph.reads_rope_factors:
        found.append(Blocker("rope_type", rope_type, f"llama.cpp's {graph.name} reads no rope_freqs"))
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
