"""Tiny models of every family as GGUF, run in llama.cpp: its log-probabilities are the native model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from export_support import make_gguf_source, make_native, sentencepiece_source

from factorctl.checkpoint.manifest import check_files, read_manifest
from factorctl.config import ExportConfig
from factorctl.errors import UsageError
from factorctl.pipeline.export import export
from factorctl.progress import SilentProgress

LLAMA3 = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}

CASES: dict[str, tuple[str, bool, int, dict[str, Any], str]] = {
    "llama, llama3 rope": ("llama", False, 2, LLAMA3, "llama"),
    "llama, linear rope, shared": ("llama", True, 1, LINEAR, "granitemoe"),
    "llama, attention biases, shared": ("llama", True, 2, {"attention_bias": True}, "granitemoe"),
    "llama, tied, all experts": ("llama-tied", False, 4, {}, "llama"),
    "mistral, window": ("mistral", False, 2, {}, "llama"),
    "mistral, wide heads, shared": ("mistral", True, 2, {"head_dim": 16, "sliding_window": None}, "granitemoe"),
    "qwen2": ("qwen2", False, 2, {}, "llama"),
    "qwen2, shared": ("qwen2", True, 2, {}, "granitemoe"),
    "qwen3": ("qwen3", False, 1, {}, "qwen3moe"),
    "qwen3, shared": ("qwen3", True, 2, {}, "qwen3moe"),
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


def test_a_type_that_llama_cpp_makes_is_refused_with_its_command(native: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"llama-quantize model\.gguf model-Q4_K_M\.gguf Q4_K_M"):
        export(ExportConfig(checkpoint=native, target="gguf", quant="q4_k_m", out=tmp_path / "g"), SilentProgress())
    assert not list(tmp_path.iterdir())


def test_an_unknown_type_is_refused_with_the_nearest(native: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'q8_0'"):
        export(ExportConfig(checkpoint=native, target="gguf", quant="q8", out=tmp_path / "g"), SilentProgress())
