"""What the proof of an export must see, planted into every target, and what must not upset it: ties of routing."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.exporting import make_gguf_source, make_native
from support.tiny import LLAMA3

from factorctl.config.export import ExportConfig, ExportTarget
from factorctl.errors import FactorctlError
from factorctl.exporting import forms
from factorctl.exporting.check import bnb_proof, gguf_proof, stock_process, stock_proof
from factorctl.exporting.check.comparison import Agreement, Fidelity
from factorctl.exporting.check.gguf_proof import every_expert_on
from factorctl.exporting.check.rounding import Rounding, require_accepted
from factorctl.exporting.check.stock import StockAnswer, StockJob, _in_order, _request
from factorctl.exporting.gguf import file as gguf_file
from factorctl.exporting.stock import dense as dense_layout
from factorctl.exporting.stock.folding import Folding, StockFFN
from factorctl.pipeline.export import plan as export_plan
from factorctl.pipeline.export.run import ExportResult, export
from factorctl.pipeline.factorize import layers as layer_factoring
from factorctl.progress import SilentProgress

SIZES = {"intermediate_size": 192}
"""Experts whose rows are whole blocks of 32 and of 16 bytes: 48 without shared neurons, 32 with a third of them."""
ARCHITECTURES = {
    "Mixtral": ("llama", False),
    "GraniteMoeShared": ("llama", True),
    "Qwen2-MoE": ("qwen2", True),
    "Qwen3-MoE": ("qwen3", False),
    "Qwen3-MoE, copied": ("qwen3", True),
}
Natives = Callable[[str], Path]


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Natives:
    """A checkpoint of each architecture, made when first asked for; with scaled RoPE where GGUF takes it."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            (family, shared), directory = ARCHITECTURES[name], tmp_path_factory.mktemp("proof")
            rope = {} if family == "qwen3" else {"rope_parameters": LLAMA3}
            source = make_gguf_source(directory / "dense", family, **SIZES, **rope)
            made[name] = make_native(directory, family, text_file, shared=shared, source=source)
        return made[name]

    return make


@pytest.fixture(autouse=True)
def _stock_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock program as it is, without the seconds that a process of its own takes to import."""

    def ask(jobs: Any) -> list[StockAnswer]:
        with tempfile.TemporaryDirectory() as scratch:
            return [_ask_here(job, Path(scratch) / "answers.safetensors") for job in jobs]

    monkeypatch.setattr(stock_proof, "ask_stock", ask)
    monkeypatch.setattr(bnb_proof, "ask_stock", ask)


def _ask_here(job: StockJob, answers: Path) -> StockAnswer:
    reply = stock_process.run(_request(job, answers))
    assert not reply["loading"]
    tensors = load_file(answers)
    return StockAnswer(reply["class"], _in_order(tensors, "logits."), 0, _in_order(tensors, "router."))


def run(native: Path, target: ExportTarget, out: Path, **options: Any) -> ExportResult:
    return export(ExportConfig(checkpoint=native, target=target, out=out, **options), SilentProgress())


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_a_fault_it_is_equal_whatever_was_rounded(
    name: str, dtype: str, native: Natives, tmp_path: Path
) -> None:
    result = run(native(name), "hf", tmp_path / "out", dtype=dtype, accept_difference=10)
    assert result.all_experts_error is not None
    assert result.all_experts_error < 1e-6
    assert (result.changed_choices is None) == (dtype == "float32")


def exchange_experts(ffn: StockFFN) -> StockFFN:
    order = [1, 0, *range(2, len(ffn.gate_NHD))]
    return dataclasses.replace(
        ffn, gate_NHD=ffn.gate_NHD[order], up_NHD=ffn.up_NHD[order], down_NDH=ffn.down_NDH[order]
    )


def stretch_router_row(ffn: StockFFN) -> StockFFN:
    factors = torch.tensor([1.01, *[1.0] * (len(ffn.router_ND) - 1)], dtype=ffn.router_ND.dtype)
    return dataclasses.replace(ffn, router_ND=ffn.router_ND * factors[:, None])


def wrong_scale(ffn: StockFFN) -> StockFFN:
    return dataclasses.replace(ffn, down_NDH=ffn.down_NDH * 1.02)


def swap_gate_and_up(ffn: StockFFN) -> StockFFN:
    gate, up = ffn.gate_NHD.clone(), ffn.up_NHD.clone()
    gate[2], up[2] = ffn.up_NHD[2], ffn.gate_NHD[2]
    return dataclasses.replace(ffn, gate_NHD=gate, up_NHD=up)


def move_a_neuron(ffn: StockFFN) -> StockFFN:
    down = ffn.down_NDH.clone()
    down[3, :, [0, 1]] = ffn.down_NDH[3, :, [1, 0]]  # the last ones may be padding
    return dataclasses.replace(ffn, down_NDH=down)


FAULTS = {fault.__name__: fault for fault in (exchange_experts, stretch_router_row, wrong_scale)}
FAULTS |= {fault.__name__: fault for fault in (swap_gate_and_up, move_a_neuron)}


def plant(monkeypatch: pytest.MonkeyPatch, fault: Callable[[StockFFN], StockFFN]) -> None:
    """Into one layer, where it is put together for writing."""
    right = Folding.stock_ffn

    def faulty(folding: Folding, layer: int, tensors: Any) -> StockFFN:
        ffn = right(folding, layer, tensors)
        return fault(ffn) if layer == 1 and not ffn.gate_NHD.is_meta else ffn

    monkeypatch.setattr(Folding, "stock_ffn", faulty)


def refused(native: Path, target: ExportTarget, out: Path, **options: Any) -> str:
    """The message; nothing may lie there."""
    with pytest.raises(FactorctlError) as refusal:
        run(native, target, out, **options)
    assert "nothing was published" in str(refusal.value.hint)
    assert not list(out.parent.iterdir())
    return str(refusal.value)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_by_stock_transformers(
    fault: str, name: str, native: Natives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, FAULTS[fault])
    message = refused(native(name), "hf", tmp_path / "out")
    assert "the export does not compute what the native model computes" in message
    if fault == "stretch_router_row":
        assert "router logits of expert 0 in layer 1 differ by 0.01 of their size" in message


@pytest.mark.parametrize("dtype", ["bfloat16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_rounding_hides_no_fault(
    fault: str, dtype: str, native: Natives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, FAULTS[fault])
    refused(native("Mixtral"), "hf", tmp_path / "out", dtype=dtype, accept_difference=100)


def other_theta(keys: dict[str, Any]) -> dict[str, Any]:
    rope = {**keys["rope_parameters"], "rope_theta": 11000.0}
    return {**keys, "rope_parameters": rope, "rope_theta": 11000.0}


def no_scaling(keys: dict[str, Any]) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": keys["rope_theta"]}
    return {**keys, "rope_parameters": rope, "rope_scaling": None}


@pytest.mark.parametrize("name", ["Mixtral", "GraniteMoeShared", "Qwen2-MoE"])
@pytest.mark.parametrize("fault", [other_theta, no_scaling])
def test_another_rope_is_refused_by_stock_transformers(
    fault: Callable[..., Any], name: str, native: Natives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = forms.stock_config
    monkeypatch.setattr(forms, "stock_config", lambda *args, **named: fault(right(*args, **named)))
    assert "router logits of expert 0 in layer 0 differ by" in refused(native(name), "hf", tmp_path / "out")


def test_another_number_of_active_experts_is_refused(
    native: Natives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = forms.stock_config
    wrong = {"num_experts_per_tok": 3}
    monkeypatch.setattr(forms, "stock_config", lambda *args, **named: {**right(*args, **named), **wrong})
    assert "as it is served" in refused(native("Mixtral"), "hf", tmp_path / "out")


@pytest.mark.parametrize("fault", ["gate and up", "columns", "theta", "scaling"])
def test_a_fault_is_refused_in_the_dense_form(
    fault: str, native: Natives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, right_config = dense_layout.unslice_ffn, forms.dense_config

    def faulty(*arguments: Any) -> Any:
        ffn = right(*arguments)
        if fault == "gate and up":
            return dataclasses.replace(ffn, gate_FD=ffn.up_FD, up_FD=ffn.gate_FD)
        down = ffn.down_DF.clone()
        down[:, [0, 1]] = ffn.down_DF[:, [1, 0]]
        return dataclasses.replace(ffn, down_DF=down)

    def other_rope(*arguments: Any, **named: Any) -> dict[str, Any]:
        config = right_config(*arguments, **named)
        return (other_theta if fault == "theta" else no_scaling)({"rope_theta": 10000.0, **config})

    if fault in ("theta", "scaling"):
        monkeypatch.setattr(forms, "dense_config", other_rope)
    else:
        monkeypatch.setattr(dense_layout, "unslice_ffn", faulty)
    assert "as it is served" in refused(native("Mixtral"), "dense", tmp_path / "out")


@pytest.mark.parametrize("name", ["Mixtral", "GraniteMoeShared", "Qwen3-MoE, copied"])
@pytest.mark.parametrize("quant", ["f16", "q8_0"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_in_a_gguf_file(
    fault: str, quant: str, name: str, native: Natives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where llama.cpp is not at hand; the layer and tensor are named."""
    monkeypatch.setattr(gguf_proof, "has_llama_cpp", lambda: False)
    plant(monkeypatch, FAULTS[fault])
    message = refused(native(name), "gguf", tmp_path / "out", quant=quant)
    is_of_a_copy = fault == "move_a_neuron" and "copied" in name  # the first neurons are shared ones there
    expected = "tensor blk.1.ffn_down_exps.weight holds other shared neurons" if is_of_a_copy else "model.layers.1.mlp."
    assert expected in message


@pytest.mark.parametrize("name", ["Mixtral", "GraniteMoeShared", "Qwen2-MoE", "Qwen3-MoE", "Qwen3-MoE, copied"])
@pytest.mark.parametrize("quant", ["f16", "bf16", "q8_0", "q5_1", "q4_0"])
def test_the_values_of_a_right_file_are_accepted(
    quant: str, name: str, native: Natives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_proof, "has_llama_cpp", lambda: False)
    result = run(native(name), "gguf", tmp_path / "out", quant=quant, accept_difference=100)
    assert "the values read back" in result.engine
    assert result.kl is not None
    assert 0 < result.kl_same_experts < 1  # type: ignore[operator]


WHAT_LLAMA_CPP_SHOWS = {
    "theta": "the file says llama.rope.freq_base = 10100.0; the model has 10000.0",
    "scaling": "the file lacks tensor rope_freqs.weight",
    "another graph": "with every expert on, logits differ by",
}


@pytest.mark.parametrize("quant", ["f16", "q8_0"])
@pytest.mark.parametrize("fault", WHAT_LLAMA_CPP_SHOWS)
def test_what_no_value_shows_is_refused_by_llama_cpp(
    fault: str, quant: str, native: Natives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp runs through xllamacpp, which is not installed")
    right = gguf_file._add_rope

    def other_rope(writer: Any, features: Any) -> None:
        rope = {**features.rope, "rope_theta": 10100.0}
        right(writer, dataclasses.replace(features, rope=rope))

    if fault == "theta":
        monkeypatch.setattr(gguf_file, "_add_rope", other_rope)
    elif fault == "scaling":
        monkeypatch.setattr("factorctl.exporting.gguf.tensors.rope_factors", lambda _: {})
    else:  # what is meant for neighbours is rotated by halves: native model and file agree on what q and k are
        monkeypatch.setattr("factorctl.exporting.gguf.tensors.GgufLayout._rotated", lambda _, __, tensor, ___: tensor)
        monkeypatch.setattr(
            "factorctl.exporting.check.gguf_values._halves",
            lambda features, letter: torch.arange(
                features.head_dim * (features.num_heads if letter == "q" else features.num_kv_heads)
            ),
        )
    message = refused(native("Mixtral"), "gguf", tmp_path / "out", quant=quant)
    assert WHAT_LLAMA_CPP_SHOWS[fault] in message


def test_the_number_of_active_experts_comes_back(native: Natives, tmp_path: Path) -> None:
    run(native("Mixtral"), "gguf", tmp_path / "out", quant="f32")
    file = tmp_path / "out" / "model.gguf"
    before = file.read_bytes()
    with every_expert_on(file, 4):
        assert file.read_bytes() != before
    assert file.read_bytes() == before


TIES = {
    "exact": lambda router_ND: router_ND[:1].expand(len(router_ND), -1).clone(),
    "by pairs": lambda router_ND: router_ND[[0, 0, 2, 2]],
    "to 1e-9": lambda router_ND: router_ND[:1] * (1 + 1e-7 * torch.arange(len(router_ND))[:, None]),
    "all zero": torch.zeros_like,
}


@pytest.mark.parametrize(("ties", "target"), [*((ties, "hf") for ties in TIES), ("to 1e-9", "gguf")])
def test_near_ties_upset_no_proof(
    ties: str, target: ExportTarget, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One expert in each layer is chosen by nothing but rounding; another one in an engine that sums differently."""
    right = layer_factoring.random_router
    monkeypatch.setattr(layer_factoring, "random_router", lambda *sizes, **named: TIES[ties](right(*sizes, **named)))
    source = make_gguf_source(tmp_path / "in" / "dense", "llama", **SIZES)
    native = make_native(tmp_path / "in", "llama", text_file, source=source, top_k=1)
    result = run(native, target, tmp_path / "out", dtype="float32")
    assert result.near_ties is not None
    assert result.near_ties > 0.4
    if target == "hf":
        plant(monkeypatch, move_a_neuron)
        (tmp_path / "again").mkdir()
        refused(native, target, tmp_path / "again" / "out")


@pytest.mark.parametrize("name", [*ARCHITECTURES, "dense"])
def test_a_model_that_does_not_fit_is_proven_layer_by_layer(
    name: str, native: Natives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target: ExportTarget = "dense" if name == "dense" else "hf"
    checkpoint = native("Mixtral" if name == "dense" else name)
    whole = run(checkpoint, target, tmp_path / "whole")
    planned = ExportConfig(checkpoint=checkpoint, target=target, out=tmp_path / "layered")
    plan = export_plan.plan_export(planned, SilentProgress())
    monkeypatch.setattr(export_plan, "available_memory", lambda: plan.memory_bytes - 1)
    layered = run(checkpoint, target, tmp_path / "layered")
    assert layered.engine.endswith("in float64, a layer at a time")
    assert layered.max_logit_error == pytest.approx(whole.max_logit_error, abs=1e-5)
    assert layered.all_experts_error == pytest.approx(whole.all_experts_error, abs=1e-6)


def test_layer_by_layer_a_tensor_too_many_or_too_few_is_named(native: Natives, tmp_path: Path) -> None:
    run(native("Mixtral"), "hf", tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 1}))
    question = stock_proof.Question([[1, 2, 3]], [range(3)])
    job = StockJob(tmp_path / "out", "float64", question, by_layer=True)
    reply = stock_process.run(_request(job, tmp_path / "answers"))
    assert all(name.startswith("model.layers.1.") for name in reply["loading"]["unexpected_keys"])


def test_what_rounding_moved_too_far_is_refused_with_the_reason_and_can_be_accepted(
    native: Natives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_proof, "has_llama_cpp", lambda: False)
    with pytest.raises(FactorctlError) as refusal:
        run(native("Mixtral"), "gguf", tmp_path / "out", quant="q8_0", accept_difference=0)
    message, hint = str(refusal.value), str(refusal.value.hint)
    assert "q8_0 moves this model by KL" in message
    assert "of the routing decisions, near ties, to other experts; with the same experts the KL would be" in message
    assert "finetune first" in hint
    accepted = float(hint.rpartition("--accept-difference ")[2])
    assert not list(tmp_path.iterdir())
    result = run(native("Mixtral"), "gguf", tmp_path / "out", quant="q8_0", accept_difference=accepted)
    assert result.kl is not None
    assert result.kl_same_experts is not None
    assert result.kl_same_experts < result.kl <= accepted
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"KL {result.kl:.2g} nats" in card
    assert "Rounding to q8_0 sends tokens to other experts" in card
    assert f"--accept-difference {accepted}" in card


def test_a_large_difference_is_refused_by_itself_and_a_noticeable_one_is_noted() -> None:
    moved = Rounding(kl=0.2, kl_same_experts=0.001, changed_choices=0.06)
    noted = Agreement(256, 5.0, 0.2, 0.7, 0.2)
    (note,) = require_accepted(noted, moved, Fidelity.INT8, dtype="q8_0", accepted=None)
    assert "6.00% of the routing decisions, near ties, to other experts" in note
    assert "finetuning makes it less" in note
    assert not require_accepted(noted, None, Fidelity.EXACT, dtype="float32", accepted=None)
    far, coarse = dataclasses.replace(noted, kl=0.79), dataclasses.replace(moved, kl_same_experts=0.7)
    assert require_accepted(far, moved, Fidelity.INT8, dtype="q8_0", accepted=None)
    with pytest.raises(FactorctlError, match=r"KL 0\.79 nats per token .*; 0\.7 is more than 0\.5: rounding"):
        require_accepted(far, coarse, Fidelity.INT4, dtype="q4_0", accepted=None)
    assert require_accepted(far, coarse, Fidelity.INT4, dtype="q4_0", accepted=0.8)
    with pytest.raises(FactorctlError, match=r"0\.2 is more than 0\.1"):
        require_accepted(noted, moved, Fidelity.INT8, dtype="q8_0", accepted=0.1)
