"""Tokens that no row of the embedding stands for: decided on when a source is factorized, and never again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import DenseSource
from support.gguf_files import write_model
from support.tiny import make_model, make_tokenizer, weights_only
from transformers import AutoTokenizer

from factorctl.config.evaluate import EvalConfig
from factorctl.errors import UsageError
from factorctl.pipeline.common.subjects import find_checkpoint, find_reference, shared_tokenizer
from factorctl.pipeline.factorize.plan import plan_factorize
from factorctl.pipeline.factorize.run import factorize
from factorctl.progress import SilentProgress

ROWS = 34
"""As many as the tiny tokenizer has tokens, so that a further one has no row."""


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., Path]:
    """A source whose tokenizer went through `edit` after the embedding was made."""

    def make(edit: Callable[[Any], None] = lambda tokenizer: None, **tokenizer_config: Any) -> Path:
        directory = tmp_path / "source"
        tokenizer = make_tokenizer()
        assert max(tokenizer.get_vocab().values()) < ROWS
        make_model(vocab_size=ROWS).save_pretrained(directory)
        edit(tokenizer)
        tokenizer.save_pretrained(directory)
        raw = json.loads((directory / "tokenizer_config.json").read_text())
        (directory / "tokenizer_config.json").write_text(json.dumps({**raw, **tokenizer_config}))
        return directory

    return make


def padded(tokenizer: Any) -> None:
    while len(tokenizer) < ROWS:
        tokenizer.add_tokens([f"<filler{len(tokenizer)}>"])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})


def noted(directory: Path, out: Path) -> list[str]:
    progress = SilentProgress()
    factorize(weights_only(directory, out), progress)
    return progress.notes


def test_a_padding_token_without_a_row_is_left_out(source: Callable[..., Path], tmp_path: Path) -> None:
    directory = source(padded)
    notes = noted(directory, tmp_path / "out")
    assert (
        f"the model embeds {ROWS} tokens: '[PAD]' ({ROWS}) of its tokenizer has no row there and is left out" in notes
    )
    made, before = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "out", directory))
    assert max(made.get_vocab().values()) < ROWS <= max(before.get_vocab().values())
    assert (made.pad_token, made.bos_token, made.eos_token) == (None, "<s>", "</s>")
    assert made("ab cd").input_ids == before("ab cd").input_ids
    config = EvalConfig(checkpoint=str(tmp_path / "out"))
    model = find_checkpoint(config, SilentProgress())
    reference = find_reference(config, model, SilentProgress())
    assert shared_tokenizer(model, reference).get_vocab() == made.get_vocab()


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda t: t.add_special_tokens({"eos_token": "<|im_end|>"}), "it is the eos_token"),
        (
            lambda t: (t.add_tokens(["<|im_start|>"]), setattr(t, "chat_template", "<|im_start|>{{ x }}")),
            "its template",
        ),
    ],
)
def test_a_token_that_the_model_needs_is_refused(
    edit: Callable[[Any], None], why: str, source: Callable[..., Path], tmp_path: Path
) -> None:
    def fill(tokenizer: Any) -> None:
        padded(tokenizer)
        edit(tokenizer)

    directory = source(fill)
    with pytest.raises(
        UsageError, match=rf"token '<\|im_.*\|>' .* has id {ROWS + 1}; the model embeds {ROWS}.*{why}"
    ) as it:
        plan_factorize(weights_only(directory, tmp_path / "out"), SilentProgress())
    assert "resize_token_embeddings" in str(it.value.hint)


def test_a_vocabulary_of_another_model_is_refused(source: Callable[..., Path], tmp_path: Path) -> None:
    directory = source()
    raw = json.loads((directory / "tokenizer.json").read_text())
    raw["model"]["vocab"]["zz"] = 700
    (directory / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UsageError, match=r"token 'zz' .* has id 700") as caught:
        plan_factorize(weights_only(directory, tmp_path / "out"), SilentProgress())
    assert "belong to another model" in str(caught.value.hint)


def test_a_token_that_its_class_brings_along_is_left_out(source: Callable[..., Path], tmp_path: Path) -> None:
    directory = source(lambda t: padded(t))
    config = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    assert "<|endoftext|>" in AutoTokenizer.from_pretrained(directory).get_vocab()
    notes = noted(directory, tmp_path / "out")
    assert any("'<|endoftext|>'" in note and "is left out" in note for note in notes)
    assert max(AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab().values()) < ROWS


def test_files_of_a_tokenizer_that_fits_travel_byte_for_byte(dense_source: DenseSource, tmp_path: Path) -> None:
    assert noted(dense_source(), tmp_path / "out") == []
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (dense_source() / name).read_bytes()


def test_a_tokenizer_that_cannot_be_read_is_found_before_the_work(dense_source: DenseSource, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(dense_source(), tmp_path / "source"))
    (directory / "tokenizer.json").write_text("{")
    progress = SilentProgress()
    plan_factorize(weights_only(directory, tmp_path / "out"), progress)
    assert any("has no tokenizer that transformers can read" in note for note in progress.notes)
    with pytest.raises(UsageError, match="has no tokenizer that transformers can read"):
        plan_factorize(weights_only(directory, tmp_path / "out", router="analytic"), SilentProgress())


def test_a_gguf_file_goes_through_every_verb(
    dense_source: DenseSource, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Llama-3-like file, whose tokens transformers' own class would add one to."""
    from support.command_line import cli

    monkeypatch.setattr("factorctl.pipeline.common.dense_source.has_llama_cpp", lambda: False)
    raw = json.loads((dense_source() / "tokenizer.json").read_text())
    raw["model"]["merges"] = [["a", "b"], ["c", "d"]]
    raw["model"]["vocab"] |= {"ab": 32, "cd": 33}
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(raw))
    path = write_model(tmp_path / "llama3.gguf", make_model(vocab_size=ROWS), tmp_path / "tokenizer", pre="llama-bpe")
    made, data = tmp_path / "made", ("--data", text)
    steps = [
        (
            "factorize", path, "-n", 4, "--strategy", "clustered", "--calibration", text, "--calibration-tokens", 512,
            "--out", made,
        ),
        ("eval", made, *data, "--data-tokens", 300, "--no-fidelity", "--out", tmp_path / "eval"),
        (
            "finetune", made, *data, "--tokens", 256, "--block-length", 64, "--heldout-tokens", 64, "--out",
            tmp_path / "tuned",
        ),
        ("export", made, "--to", "hf", "--out", tmp_path / "hf"),
    ]  # fmt: skip
    for step in steps:
        outcome = cli(*step)
        assert outcome.code == 0, outcome.stderr
    source = json.loads((made / "factorctl.json").read_text())["source"]
    assert source["path"] == str(path)
