"""What a target cannot hold is refused by field and value, with the targets that can."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support.tiny import LLAMA3
from support.tiny import dense_outline as model

from factorctl.config.export import Arch, ExportTarget
from factorctl.config.shape import FactorShape
from factorctl.errors import UsageError
from factorctl.exporting.engines import Engine, as_served
from factorctl.exporting.stock.choice import architecture_for, blockers, refuse_blocked
from factorctl.ffn.spec import FactoredSpec
from factorctl.models.families import DenseModel

ROUTED = FactoredSpec(FactorShape(4, 2, 12, 0), "softmax", "sum")
SHARED = FactoredSpec(FactorShape(4, 2, 8, 16), "softmax", "sum")
WIDE = {"head_dim": 16, "sliding_window": None}
BY_64 = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


def with_k(spec: FactoredSpec, top_k: int, gate: str = "softmax") -> FactoredSpec:
    return dataclasses.replace(spec, shape=dataclasses.replace(spec.shape, top_k=top_k), gate=gate)  # type: ignore[arg-type]


REFUSED: list[tuple[str, DenseModel, FactoredSpec, ExportTarget, str, str]] = [
    ("activation", model("llama", hidden_act="gelu"), ROUTED, "hf", "hidden_act = 'gelu'", "--to dense"),
    ("activation", model("llama", hidden_act="relu"), ROUTED, "gguf", "hidden_act = 'relu'", "--to dense"),
    ("mlp_bias", model("llama", mlp_bias=True), ROUTED, "hf", "mlp_bias = True", "--to dense"),
    ("attention_bias", model("qwen3", attention_bias=True), ROUTED, "hf", "attention_bias = True", "--to dense"),
    ("head_dim", model("mistral", head_dim=16, sliding_window=None), SHARED, "hf", "head_dim = 16", "--to gguf"),
    ("window", model("mistral"), SHARED, "hf", "sliding_window = 8", "--to gguf"),
    ("longrope", model("phi3", rope_parameters=LONGROPE), ROUTED, "hf", "rope_type = 'longrope'", "--to dense"),
    ("llama3 qwen3", model("qwen3", rope_parameters=LLAMA3), ROUTED, "gguf", "rope_type = 'llama3'", "--to hf"),
    ("biases qwen3", model("qwen3", attention_bias=True), ROUTED, "gguf", "attention_bias = True", "--to dense"),
    ("layers", model("llama", num_hidden_layers=513), ROUTED, "gguf", "num_hidden_layers = 513", "--to hf"),
    ("gemma", model("gemma"), ROUTED, "hf", "model_type = 'gemma'", "--to dense"),
    ("gemma3", model("gemma3_text"), ROUTED, "gguf", "model_type = 'gemma3_text'", "--to dense"),
    ("no expert", model("llama"), with_k(SHARED, 0), "hf", "top_k = 0", "--to dense"),
    ("bnb gemma", model("gemma"), ROUTED, "bnb-4bit", "model_type = 'gemma'", "--to dense"),
    ("bnb", model("mistral", **WIDE), SHARED, "bnb-8bit", "head_dim = 16", "--to gguf --quant q8_0"),
    ("bnb rows", model("llama", **BY_64), with_k(SHARED, 0), "bnb-4bit", "shared_size = 16", "--to bnb-8bit"),
    ("bnb hard", model("llama"), with_k(ROUTED, 2, "hard"), "bnb-4bit", "gate = 'hard'", "--to dense"),
    ("hard", model("llama"), with_k(ROUTED, 2, "hard"), "hf", "gate = 'hard'", "--to dense"),
]


@pytest.mark.parametrize(
    ("dense", "spec", "target", "named", "instead"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_refused_by_name(dense: DenseModel, spec: FactoredSpec, target: ExportTarget, named: str, instead: str) -> None:
    with pytest.raises(UsageError) as refusal:
        refuse_blocked(dense, spec, target, exact=True)
    assert f"--to {target} cannot hold this model: {named}" in refusal.value.message
    assert refusal.value.hint is not None
    assert instead in refusal.value.hint


HELD: list[tuple[str, DenseModel, FactoredSpec, ExportTarget]] = [
    ("window in Mixtral", model("mistral"), ROUTED, "hf"),
    ("wide heads in Mixtral", model("mistral", head_dim=16), ROUTED, "hf"),
    ("llama3 rope", model("llama", rope_parameters=LLAMA3), SHARED, "hf"),
    ("llama3 rope", model("llama", rope_parameters=LLAMA3), SHARED, "gguf"),
    ("attention biases in the hybrid", model("llama", attention_bias=True), ROUTED, "hf"),
    ("hard at K = 1", model("llama"), with_k(ROUTED, 1, "hard"), "hf"),
    ("hard at K = N", model("llama"), with_k(ROUTED, 4, "hard"), "hf"),
    ("fitted scales per layer", model("llama"), dataclasses.replace(ROUTED, scale="fitted", fitted_a=(0.5, 1.7)), "hf"),
    ("gemma dense", model("gemma2"), ROUTED, "dense"),
    ("bnb, routed", model("llama"), ROUTED, "bnb-4bit"),
    ("bnb, routed and shared", model("qwen3"), SHARED, "bnb-8bit"),
    ("bnb, all on", model("gemma2", **BY_64), with_k(ROUTED, 4), "bnb-4bit"),
    ("bnb, none on", model("llama"), with_k(SHARED, 0), "bnb-8bit"),
]


@pytest.mark.parametrize(("dense", "spec", "target"), [h[1:] for h in HELD], ids=[h[0] for h in HELD])
def test_held(dense: DenseModel, spec: FactoredSpec, target: ExportTarget) -> None:
    assert blockers(dense, spec, target, exact=True) == []


def test_every_fault_is_named_at_once() -> None:
    biased = model("qwen3", attention_bias=True, hidden_act="gelu", rope_parameters=LONGROPE)
    with pytest.raises(UsageError, match=r"hidden_act = 'gelu'.*attention_bias = True.*rope_type = 'longrope'"):
        refuse_blocked(biased, ROUTED, "hf", exact=False)


NOT_IN: list[tuple[Arch, DenseModel, FactoredSpec, str, str | None]] = [
    ("mixtral", model("llama"), SHARED, "shared_size = 16: MixtralForCausalLM has no neurons", "granite-moe-hybrid"),
    ("mixtral", model("qwen2"), ROUTED, "q_proj.bias = True: engines would drop biases", "granite-moe-hybrid"),
    ("granite-moe-shared", model("llama", attention_bias=True), SHARED, "attention_bias = True", "granite-moe-hybrid"),
    ("granite-moe-shared", model("mistral"), SHARED, "sliding_window = 8", None),
    ("granite-moe-hybrid", model("mistral", **WIDE), ROUTED, "head_dim = 16", "mixtral"),
    ("granite-moe-hybrid", model("qwen3"), ROUTED, "qk_norm = True", "qwen3-moe"),
    ("qwen2-moe", model("qwen3"), ROUTED, "qk_norm = True", "qwen3-moe"),
    ("qwen3-moe", model("llama"), ROUTED, "qk_norm = False", "mixtral, --arch granite-moe-hybrid"),
    ("glm4-moe", model("llama"), SHARED, "gate = 'softmax': Glm4MoeForCausalLM weighs 2 of 4", "granite-moe-hybrid"),
    ("glm4-moe", model("llama", attention_bias=True), with_k(SHARED, 4), "attention_bias", "granite-moe-hybrid"),
]


@pytest.mark.parametrize(("arch", "dense", "spec", "named", "instead"), NOT_IN, ids=[f"{r[0]}: {r[3]}" for r in NOT_IN])
def test_an_architecture_that_cannot_hold_it_is_refused_by_name(
    arch: Arch, dense: DenseModel, spec: FactoredSpec, named: str, instead: str | None
) -> None:
    with pytest.raises(UsageError) as refusal:
        refuse_blocked(dense, spec, "hf", exact=False, arch=arch)
    assert f"--arch {arch} cannot hold this model: {named}" in refusal.value.message
    assert refusal.value.hint is not None
    if instead is None:
        assert "architectures that can" not in refusal.value.hint
    else:
        assert f"--arch {instead}" in refusal.value.hint.partition("; targets")[0]


AUTO: list[tuple[DenseModel, FactoredSpec, Arch]] = [
    (model("llama"), ROUTED, "mixtral"),
    (model("llama"), SHARED, "granite-moe-hybrid"),
    (model("llama", rope_parameters=LLAMA3), ROUTED, "mixtral"),
    (model("phi3"), SHARED, "granite-moe-hybrid"),
    (model("llama", attention_bias=True), SHARED, "granite-moe-hybrid"),
    (model("qwen2"), SHARED, "qwen2-moe"),
    (model("qwen3"), SHARED, "qwen3-moe"),
]


@pytest.mark.parametrize(("dense", "spec", "expected"), AUTO)
def test_auto_takes_what_most_engines_run_right(dense: DenseModel, spec: FactoredSpec, expected: Arch) -> None:
    assert architecture_for(dense, spec).option == expected


def test_the_hybrid_runs_in_more_engines_than_granite_moe_shared() -> None:
    dense = model("llama")
    hybrid, shared = (
        architecture_for(dense, SHARED, arch).engines_that_run(as_served(dense, SHARED))
        for arch in ("granite-moe-hybrid", "granite-moe-shared")
    )
    assert {"mlx-lm 0.32", "OpenVINO (optimum-intel 2.2)"} <= set(hybrid) - set(shared)


WRONG: list[tuple[str, DenseModel, FactoredSpec, Arch, bool]] = [
    ("mlx-lm", model("qwen2"), ROUTED, "auto", True),
    ("mlx-lm", model("qwen2"), with_k(ROUTED, 4), "auto", False),
    ("mlx-lm", model("qwen2"), ROUTED, "granite-moe-hybrid", False),
    ("mlx-lm", model("llama", rope_parameters=LLAMA3), SHARED, "auto", True),
    ("mlx-lm", model("llama"), SHARED, "auto", False),
    ("mlx-lm", model("mistral"), ROUTED, "auto", True),
    ("mlx-lm", model("llama"), with_k(SHARED, 1), "glm4-moe", True),
    ("mistral.rs", model("llama", rope_parameters=LLAMA3), ROUTED, "auto", True),
    ("SGLang", model("llama", rope_parameters=LLAMA3), SHARED, "granite-moe-shared", True),
    ("SGLang", model("llama", rope_parameters=LLAMA3), SHARED, "granite-moe-hybrid", False),
    ("SGLang", model("llama-tied"), ROUTED, "auto", True),
    ("ONNX Runtime GenAI", model("llama"), SHARED, "auto", True),
    ("ONNX Runtime GenAI", model("llama"), ROUTED, "auto", False),
    ("llama.cpp's own converter", model("qwen2"), SHARED, "auto", True),
    ("vLLM", model("llama", rope_parameters=LLAMA3), SHARED, "auto", False),
]


@pytest.mark.parametrize(("engine", "dense", "spec", "arch", "is_wrong"), WRONG)
def test_engines_that_run_it_wrongly_are_known(
    engine: str, dense: DenseModel, spec: FactoredSpec, arch: Arch, is_wrong: bool
) -> None:
    found = architecture_for(dense, spec, arch).flaws_in(as_served(dense, spec))
    assert any(flaw.engine.startswith(engine) and flaw.is_silent for flaw in found) is is_wrong


def test_every_engine_is_in_the_table_of_the_docs() -> None:
    table = (Path(__file__).parents[3] / "docs" / "serve.md").read_text()
    assert [engine for engine in Engine if f"| {engine} " not in table] == []


def test_few_bits_are_not_promised_where_gguf_is_refused_too() -> None:
    wide = model("mistral", **WIDE)
    for dense, promised in (
        (model("llama", mlp_bias=True), False),
        (model("qwen3", attention_bias=True), False),
        (wide, True),
    ):
        with pytest.raises(UsageError) as refusal:
            refuse_blocked(dense, SHARED, "bnb-8bit", exact=False)
        assert ("--to gguf --quant q8_0" in str(refusal.value.hint)) == promised
