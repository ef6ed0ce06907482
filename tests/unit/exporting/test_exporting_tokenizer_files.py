"""tokenizer_config.json: what transformers 5 alone knows is said so that transformers 4 knows it too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.exporting import export_unchecked, make_native
from support.tiny import factorize_quietly, make_source, make_tokenizer, weights_only
from transformers import AutoTokenizer

from factorctl.checkpoint.manifest import check_files, read_manifest
from factorctl.config.export import ExportConfig
from factorctl.errors import IntegrityError
from factorctl.exporting.stock.writer import portable_bytes, portable_config


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (
            {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "is_local": True, "eos_token": "</s>"},
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"},
        ),
        (
            {"tokenizer_class": "LlamaTokenizer", "extra_special_tokens": ["<x>"], "local_files_only": False},
            {"tokenizer_class": "LlamaTokenizer", "additional_special_tokens": ["<x>"]},
        ),
        ({"tokenizer_class": "GPT2Tokenizer", "backend": "tokenizers"}, {"tokenizer_class": "GPT2Tokenizer"}),
        (
            {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": []},
            {"tokenizer_class": "PreTrainedTokenizerFast"},
        ),
    ],
)
def test_newer_words_are_replaced(raw: dict[str, Any], expected: dict[str, Any]) -> None:
    assert portable_config(raw, has_tokenizer_json=True) == expected


@pytest.mark.parametrize(
    "raw",
    [
        {
            "tokenizer_class": "GPT2Tokenizer",
            "additional_special_tokens": ["<x>"],
            "extra_special_tokens": {"image": "<i>"},
        },
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None},
        {},
    ],
)
def test_an_older_file_stays_byte_for_byte(raw: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(raw, indent=4))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert portable_bytes(path) == path.read_bytes()


def test_the_exported_tokenizer_is_the_same(tmp_path: Path) -> None:
    source = make_source(tmp_path / "dense", "llama")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<x>"]})
    tokenizer.chat_template = {"default": "A{{ messages }}", "tool_use": "B{{ messages }}"}
    tokenizer.save_pretrained(source)
    factorize_quietly(weights_only(source, tmp_path / "native", top_k=2))
    native, out = tmp_path / "native", tmp_path / "out"
    export_unchecked(ExportConfig(checkpoint=native, out=out))
    written = json.loads((out / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<x>"]
    assert not {"backend", "is_local", "local_files_only", "extra_special_tokens"} & set(written)
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(out)
    assert after("ab<x>c</s>")["input_ids"] == before("ab<x>c</s>")["input_ids"]
    assert after.all_special_tokens == before.all_special_tokens
    assert after.chat_template == before.chat_template == tokenizer.chat_template


def test_further_chat_templates_travel_and_are_in_the_manifest(tmp_path: Path) -> None:
    source = make_source(tmp_path / "dense", "llama")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": "A", "tool_use": "B"}
    tokenizer.save_pretrained(source)
    native = tmp_path / "native"
    factorize_quietly(weights_only(source, native, top_k=2))
    name = "additional_chat_templates/tool_use.jinja"
    assert (native / name).read_bytes() == (source / name).read_bytes()
    assert name in read_manifest(native).files
    assert name in read_manifest(native).source["files"]
    (native / name).write_text("C")
    with pytest.raises(IntegrityError, match=r"tool_use.jinja has sha256"):
        list(check_files(native, read_manifest(native)))


@pytest.mark.parametrize("name", ["additional_chat_templates/../x", "other/x.jinja", "additional_chat_templates/a/b"])
def test_no_other_directory_is_an_artefacts(name: str) -> None:
    from factorctl.files.names import artefact_name

    with pytest.raises(IntegrityError, match="only plain names"):
        artefact_name(name, origin="a manifest")


def test_loading_the_tokenizer_of_a_native_checkpoint_warns_of_nothing(
    tmp_path: Path, text_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    native = make_native(tmp_path, "llama", text_file)
    capfd.readouterr()
    AutoTokenizer.from_pretrained(native)
    assert "factorctl" not in capfd.readouterr().err
