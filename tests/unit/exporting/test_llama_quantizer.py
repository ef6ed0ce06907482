"""Finding llama.cpp's quantiser, and what is said where there is none."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from factorctl.errors import UsageError
from factorctl.exporting.gguf.llama_quantizer import (
    MIXED,
    Quantizer,
    QuantizerError,
    file_type,
    find_quantizer,
    require_quantizer,
)
from factorctl.exporting.gguf.tensors import chosen_quant, storage_type

PROGRAM = f"""#!{sys.executable}
import pathlib, sys
plain, out, kind, threads = sys.argv[1:]
if kind == "Q6_K":
    sys.exit("main: failed to quantize: error: no such tensor")
pathlib.Path(out).write_text(f"{{pathlib.Path(plain).read_text()}} as {{kind}}")
"""


@pytest.fixture
def without_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """cyllama is not installed, and PATH is one empty directory."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cyllama" else find_spec(name))
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_without_a_quantiser_the_hint_says_two_ways(without_package: Path) -> None:
    assert find_quantizer() is None
    with pytest.raises(
        UsageError, match="neither the package cyllama nor the program llama-quantize is here"
    ) as refusal:
        require_quantizer("q4_k_m")
    assert "pip install cyllama" in str(refusal.value.hint)
    assert "llama-quantize model.gguf model-Q4_K_M.gguf Q4_K_M" in str(refusal.value.hint)


def test_the_program_on_path_serves(without_package: Path) -> None:
    program = without_package / "llama-quantize"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    found = require_quantizer("q4_k_m")
    assert found.name == f"llama.cpp ({program})"
    plain, out = without_package / "plain.gguf", without_package / "model.gguf"
    plain.write_text("weights")
    found.quantise(plain, out, "q4_k_m")
    assert out.read_text() == "weights as Q4_K_M"
    with pytest.raises(QuantizerError, match="did not make q6_k: main: failed to quantize: error: no such tensor"):
        found.quantise(plain, without_package / "other.gguf", "q6_k")


def test_the_installed_package_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        mock.patch.object(importlib.util, "find_spec", return_value=object()),
        mock.patch("factorctl.exporting.gguf.llama_quantizer.version", return_value="1.2.3"),
    ):
        found = find_quantizer()
    assert found is not None
    assert found.name == "llama.cpp (cyllama 1.2.3)"
    assert found.by_number
    assert isinstance(found, Quantizer)


@pytest.mark.parametrize("quant", MIXED)
def test_every_mixed_type_has_llama_cpps_number(quant: str) -> None:
    assert file_type(quant).name == f"MOSTLY_{quant.upper()}"
    assert chosen_quant(quant.upper(), torch.float32) == quant


def test_short_names_mean_what_llama_quantize_takes_them_for() -> None:
    assert chosen_quant("Q4_K", torch.float32) == "q4_k_m"


def test_a_type_with_an_importance_matrix_is_refused_with_its_command() -> None:
    with pytest.raises(UsageError, match="--quant IQ2_XS takes an importance matrix") as refusal:
        chosen_quant("IQ2_XS", torch.float32)
    assert "llama-quantize model.gguf model-IQ2_XS.gguf IQ2_XS" in str(refusal.value.hint)


def test_rows_that_are_no_multiple_of_256_get_a_larger_type() -> None:
    assert storage_type("blk.0.ffn_up_exps.weight", (4, 12, 256), "q4_k_m").name == "Q4_K"
    assert storage_type("blk.0.ffn_up_exps.weight", (4, 12, 64), "q4_k_m").name == "Q5_0"
    assert storage_type("blk.0.ffn_up_exps.weight", (4, 12, 20), "q4_k_m").name == "F16"
    assert storage_type("token_embd.weight", (300, 256), "q4_k_m").name == "Q6_K"
    assert storage_type("blk.0.ffn_gate_inp.weight", (4, 256), "q4_k_m").name == "F32"
