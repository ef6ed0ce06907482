"""Tiny models of every family as GGUF, run in llama.cpp: its log-probabilities are the native model's."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from gguf import GGUFReader, TokenType
from support.exporting import make_gguf_source, make_native, sentencepiece_source
from support.tiny import LLAMA3

from factorctl.checkpoint.manifest import check_files, read_manifest
from factorctl.config.export import ExportConfig
from factorctl.errors import FactorctlError, UsageError
from factorctl.exporting.gguf import writer as gguf_writer
from factorctl.exporting.gguf.llama_quantizer import Quantizer
from factorctl.exporting.gguf.tokenizer import GgufTokenizer, read_tokenizer
from factorctl.pipeline.export.run import export
from factorctl.progress import SilentProgress

SCALED = {"rope_parameters": LLAMA3}
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}

CASES: dict[str, tuple[str, bool, int, dict[str, Any], str]] = {
    "llama, llama3 rope": ("llama", False, 2, SCALED, "llama"),
    "llama, linear rope, shared": ("llama", True, 1, LINEAR, "granitemoe"),
    "llama, attention biases, shared": ("llama", True, 2, {"attention_bias": True}, "granitemoe"),
    "llama, tied, all experts": ("llama-tied", False, 4, {}, "llama"),
    "mistral, window": ("mistral", False, 2, {}, "llama"),
    "mistral, wide heads, shared": ("mistral", True, 2, {"head_dim": 16, "sliding_window": None}, "granitemoe"),
    "qwen2": ("qwen2", False, 2, {}, "llama"),
    "qwen2, shared": ("qwen2", True, 2, {}, "granitemoe"),
    "qwen3": ("qwen3", False, 1, {}, "qwen3moe"),
    "qwen3, shared": ("qwen3", True, 2, {}, "qwen3moe"),
    "qwen3, linear rope, wide heads": ("qwen3", False, 2, {**LINEAR, "head_dim": 16}, "qwen3moe"),
    "llama, llama3 rope, attention biases, shared": (
        "llama",
        True,
        2,
        {**SCALED, "attention_bias": True},
        "granitemoe",
    ),
    "phi3": ("phi3", False, 2, {}, "llama"),
}


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path, text_file: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp runs through xllamacpp, which is not installed")
    family, shared, top_k, changes, architecture = CASES[name]
    source = make_gguf_source(tmp_path / "dense", family, **changes)
    native = make_native(tmp_path, family, text_file, shared=shared, source=source, top_k=top_k)
    result = export(
        ExportConfig(checkpoint=native, target="gguf", out=tmp_path / "gguf", verify_gguf=True), SilentProgress()
    )
    assert result.architecture == architecture
    assert result.engine.startswith("llama.cpp")
    assert result.max_logit_error is not None
    assert result.max_logit_error < 1e-2
    assert result.top1_agreement == 1
    manifest = read_manifest(tmp_path / "gguf")
    assert {"model.gguf", "Modelfile", "README.md"} == set(check_files(tmp_path / "gguf", manifest))
    assert manifest.parent == read_manifest(native).sha256


def test_a_sentencepiece_tokenizer_gives_the_same_ids_in_llama_cpp(tmp_path: Path, text_file: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp runs through xllamacpp, which is not installed")
    pytest.importorskip("sentencepiece", reason="tokenizer.model is read by sentencepiece, which is not installed")
    native = make_native(tmp_path, "llama", text_file, source=sentencepiece_source(tmp_path / "dense"))
    result = export(ExportConfig(checkpoint=native, target="gguf", out=tmp_path / "gguf"), SilentProgress())
    assert result.tokens_compared == 256
    assert result.top1_agreement == 1


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    directory = tmp_path_factory.mktemp("gguf")
    return make_native(directory, "llama", text_file, source=make_gguf_source(directory / "dense", "llama"))


@pytest.mark.parametrize(("quant", "limit"), [("bf16", 0.3), ("q8_0", 0.4), ("q4_0", 0.8)])
def test_quantised_files_load_and_stay_near(quant: str, limit: float, native: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp runs through xllamacpp, which is not installed")
    result = export(
        ExportConfig(checkpoint=native, target="gguf", quant=quant, out=tmp_path / "gguf"), SilentProgress()
    )
    assert result.dtype == quant
    agreement = read_manifest(tmp_path / "gguf").details["agreement"]
    assert 0 < agreement["relative_error"] < limit


def test_an_unknown_type_is_refused_with_the_nearest(native: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'q8_0'"):
        export(ExportConfig(checkpoint=native, target="gguf", quant="q8", out=tmp_path / "g"), SilentProgress())


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IM_START, IM_END = 267, 268


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """Its tokens for turns stand in added_tokens.json, its eos in special_tokens_map.json, as older models have it."""
    directory = tmp_path_factory.mktemp("chat")
    source = make_gguf_source(directory / "Tiny-chat_v2", "llama")
    config = json.loads((source / "tokenizer_config.json").read_text())
    del config["eos_token"], config["bos_token"]
    named = {"eos_token": "</s>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    written = {
        "tokenizer_config.json": config,
        "special_tokens_map.json": named,
        "added_tokens.json": {"<|im_start|>": IM_START, "<|im_end|>": IM_END},
        "config.json": {**json.loads((source / "config.json").read_text()), "license": "apache-2.0"},
    }
    for name, value in written.items():
        (source / name).write_text(json.dumps(value))
    (source / "chat_template.jinja").write_text(CHATML)
    return make_native(directory, "llama", text_file, source=source)


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path / "model.gguf").fields.items()}


def test_special_tokens_chat_template_and_names_arrive(chatting: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp runs through xllamacpp, which is not installed")
    result = export(ExportConfig(checkpoint=chatting, target="gguf", out=tmp_path / "gguf"), SilentProgress())
    assert result.engine.startswith("llama.cpp")
    stated = fields(tmp_path / "gguf")
    assert stated["tokenizer.ggml.eos_token_id"] == 2
    assert stated["tokenizer.ggml.eot_token_id"] == IM_END
    assert stated["tokenizer.ggml.tokens"][IM_START] == "<|im_start|>"
    assert stated["tokenizer.chat_template"] == CHATML
    assert stated["general.name"] == "Tiny-chat_v2 1R4E2K"
    assert stated["general.base_model.0.name"] == "Tiny-chat_v2"
    assert stated["general.type"] == "model"
    assert stated["general.license"] == "apache-2.0"
    assert stated["general.size_label"].startswith("4x")
    written = (tmp_path / "gguf" / "Modelfile").read_text()
    assert "FROM ./model.gguf" in written
    assert '{{ if eq $m.Role "user" }}<|im_start|>user\n{{ $m.Content }}<|im_end|>\n' in written
    assert 'PARAMETER stop "</s>"\nPARAMETER stop "<|im_end|>"\nPARAMETER stop "<|im_start|>"\n' in written
    assert result.bits_per_weight is not None
    assert result.bits_per_weight > 16


PLANTED = {
    "a special token that is text": (
        lambda tokenizer: {"types": [*tokenizer.types[:IM_START], int(TokenType.NORMAL), *tokenizer.types[IM_END:]]},
        r"llama.cpp reads the special token '<\|im_start\|>' as \[.*\] .*; the model's own tokenizer gives \[267\]",
    ),
    "an end of text that is none": (
        lambda tokenizer: {"special": dataclasses.replace(tokenizer.special, ends=(*tokenizer.special.ends, 40))},
        r"llama.cpp goes on behind token 40 \('.'\), which ends a text",
    ),
    "merges in another order": (
        lambda tokenizer: {"merges": tokenizer.merges[::-1]},
        r"llama.cpp tokenises .* from token \d+ on",
    ),
    "an end of text added": (
        lambda tokenizer: {"special": dataclasses.replace(tokenizer.special, adds_eos=True)},
        r"llama.cpp tokenises .*",
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_tokenizer_that_llama_cpp_reads_otherwise_is_not_published(
    fault: str, chatting: Path, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp runs through xllamacpp, which is not installed")
    changes, message = PLANTED[fault]

    def faulty(*args: Any, **options: Any) -> GgufTokenizer:
        tokenizer = read_tokenizer(*args, **options)
        return dataclasses.replace(tokenizer, **changes(tokenizer))

    config = ExportConfig(checkpoint=chatting, target="gguf", out=tmp_path / "gguf")
    with mock.patch.object(gguf_writer, "read_tokenizer", faulty), pytest.raises(FactorctlError, match=message):
        export(config, SilentProgress())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("has_engine", [True, False])
def test_qwen3_with_attention_biases_is_refused_by_field(
    has_engine: bool, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_engine:
        hide(monkeypatch, "xllamacpp")
    source = make_gguf_source(tmp_path / "dense", "qwen3", attention_bias=True)
    native = make_native(tmp_path, "qwen3", text_file, source=source)
    out = tmp_path / "gguf"
    with pytest.raises(
        UsageError, match=r"--to gguf cannot hold this model: attention_bias = True: llama\.cpp's qwen3moe"
    ):
        export(ExportConfig(checkpoint=native, target="gguf", out=out), SilentProgress())
    assert not out.exists()


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))


def test_a_missing_tokenizer_model_is_rebuilt_and_judged_by_llama_cpp(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp runs through xllamacpp, which is not installed")
    pytest.importorskip("sentencepiece", reason="tokenizer.model is read by sentencepiece, which is not installed")
    source = sentencepiece_source(tmp_path / "dense")
    (source / "tokenizer.model").unlink()
    native = make_native(tmp_path, "llama", text_file, source=source)
    result = export(ExportConfig(checkpoint=native, target="gguf", out=tmp_path / "gguf"), SilentProgress())
    assert result.top1_agreement == 1
    assert any("its scores are derived from the merges of tokenizer.json" in note for note in result.notes)

    raw = json.loads((native / "tokenizer.json").read_text())
    wrong = {**raw, "model": {**raw["model"], "merges": raw["model"]["merges"][::-1]}}
    with (
        mock.patch("factorctl.exporting.gguf.tokenizer.read_json_object", return_value=wrong),
        pytest.raises(FactorctlError, match=r"llama.cpp tokenises .* the model's own tokenizer gives"),
    ):
        export(ExportConfig(checkpoint=native, target="gguf", out=tmp_path / "wrong"), SilentProgress())
    assert not (tmp_path / "wrong").exists()

    hide(monkeypatch, "xllamacpp")
    with pytest.raises(UsageError, match=r"no tokenizer\.model; .* only llama\.cpp can say") as refusal:
        export(ExportConfig(checkpoint=native, target="gguf", out=tmp_path / "unjudged"), SilentProgress())
    assert "pip install xllamacpp" in str(refusal.value.hint)


@pytest.fixture(scope="module")
def by_256(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """Rows of 256 weights, as K-quants need; every expert is on, so that rounding exchanges none."""
    directory = tmp_path_factory.mktemp("wide")
    source = make_gguf_source(
        directory / "dense", "llama", hidden_size=256, intermediate_size=1024, initializer_range=0.05
    )
    return make_native(directory, "llama", text_file, source=source, top_k=4)


@pytest.mark.parametrize(("quant", "bits"), [("q6_k", 6.5), ("q4_k_m", 4.5)])
def test_llama_cpps_own_quantiser_makes_the_mixed_types(quant: str, bits: float, by_256: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp runs through xllamacpp, which is not installed")
    pytest.importorskip("cyllama", reason="llama.cpp's quantiser runs through cyllama, which is not installed")
    config = ExportConfig(checkpoint=by_256, target="gguf", quant=quant, out=tmp_path / "gguf")
    result = export(config, SilentProgress())
    assert (result.dtype, result.engine[:9]) == (quant, "llama.cpp")
    assert result.bits_per_weight is not None
    assert bits <= result.bits_per_weight < bits + 1
    tensors = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "gguf" / "model.gguf").tensors}
    assert tensors["blk.0.ffn_gate_exps.weight"] == quant[:4].upper()
    assert tensors["blk.0.ffn_gate_inp.weight"] == "F32"
    assert any("quantised by llama.cpp (cyllama" in note for note in result.notes)
    assert {path.name for path in (tmp_path / "gguf").iterdir()} == {
        "model.gguf", "Modelfile", "README.md", "factorctl.json",
    }  # fmt: skip
    assert f"{result.bits_per_weight:.2f} bits a weight" in (tmp_path / "gguf" / "README.md").read_text()


def test_a_quantiser_that_exchanges_two_experts_is_found_out(by_256: Path, tmp_path: Path) -> None:
    pytest.importorskip("cyllama", reason="llama.cpp's quantiser runs through cyllama, which is not installed")
    quantise = Quantizer.quantise

    def exchange(self: Quantizer, plain: Path, out: Path, quant: str) -> None:
        reader = GGUFReader(plain, "r+")
        (experts_NHD,) = [tensor.data for tensor in reader.tensors if tensor.name == "blk.1.ffn_up_exps.weight"]
        experts_NHD[[0, 1]] = experts_NHD[[1, 0]]
        reader.data.flush()
        quantise(self, plain, out, quant)

    config = ExportConfig(checkpoint=by_256, target="gguf", quant="q4_k_m", out=tmp_path / "gguf")
    with (
        mock.patch.object(Quantizer, "quantise", exchange),
        pytest.raises(
            FactorctlError, match=r"model\.gguf: tensor blk\.1\.ffn_up_exps\.weight is off by 1\.\d of its norm"
        ),
    ):
        export(config, SilentProgress())
    assert not list(tmp_path.iterdir())
