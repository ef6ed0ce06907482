"""BOS and EOS arrive from whichever of a source's files names them, and are the same in a checkpoint made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny import factorize_quietly, make_source, make_tokenizer, weights_only

from factorctl.data.building import build_token_blocks
from factorctl.data.spec import parse_data_spec
from factorctl.models.loading import open_checkpoint
from factorctl.pipeline.common.tokenizers import load_tokenizer

BOTH = {"bos_token": "<s>", "eos_token": "</s>"}
IDS = {"bos_token_id": 1, "eos_token_id": 2}


def nameless(directory: Path, files: dict[str, dict[str, Any]]) -> Path:
    """The tiny tokenizer, whose special tokens are named by `files` alone."""
    make_tokenizer().save_pretrained(directory)
    kept = json.loads((directory / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        kept.pop(name)
    for name, content in {"tokenizer_config.json": {}, "config.json": {"model_type": "llama"}, **files}.items():
        base = kept if name == "tokenizer_config.json" else {"model_type": "llama"} if name == "config.json" else {}
        (directory / name).write_text(json.dumps(base | content))
    return directory


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": BOTH},
        {"special_tokens_map.json": BOTH},
        {"special_tokens_map.json": {name: {"content": token} for name, token in BOTH.items()}},
        {"generation_config.json": IDS},
        {"generation_config.json": {"bos_token_id": 1, "eos_token_id": [2, 3]}},
        {"config.json": IDS},
        {"generation_config.json": {"eos_token_id": 2}, "config.json": {"bos_token_id": 1, "eos_token_id": 3}},
        {"special_tokens_map.json": BOTH, "config.json": {"bos_token_id": 3, "eos_token_id": 3}},
    ],
)
def test_every_file_that_may_name_them(tmp_path: Path, files: dict[str, dict[str, Any]]) -> None:
    tokenizer = load_tokenizer(nameless(tmp_path, files), hint="")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer("ab")["input_ids"] == make_tokenizer()("ab")["input_ids"], "naming them changes no encoding"


@pytest.mark.parametrize("ids", [{"eos_token_id": 4}, {"eos_token_id": 4000}, {"eos_token_id": None}, {}])
def test_ids_of_ordinary_tokens_are_no_end_of_text(tmp_path: Path, ids: dict[str, Any]) -> None:
    """A config that names none is written with the ids 1 and 2, whatever the vocabulary has there."""
    assert load_tokenizer(nameless(tmp_path, {"config.json": ids}), hint="").eos_token is None


def test_a_checkpoint_packs_text_as_its_source_does(tmp_path: Path, text: Path) -> None:
    source = make_source(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "generation_config.json").unlink(missing_ok=True)
    nameless(source, {"config.json": config})
    factorize_quietly(weights_only(source, tmp_path / "made"))
    checkpoint = open_checkpoint(tmp_path / "made")
    tokenizers = [
        load_tokenizer(source, hint=""),
        load_tokenizer(tmp_path / "made", hint="", config=checkpoint.dense.config),
    ]
    packed = [
        build_token_blocks(
            parse_data_spec(str(text)), tokenizer, block_length=32, tokens=512, seed=0, cache_dir=tmp_path / "cache"
        )
        for tokenizer in tokenizers
    ]
    assert packed[0].fingerprint == packed[1].fingerprint
    assert (packed[0].train == 2).any(), "EOS, which config.json alone names, stands between documents"
