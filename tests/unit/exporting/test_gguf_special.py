"""Special tokens from any of the files that may name them, and the vocabulary that holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from support.exporting import GGUF_VOCAB, byte_tokenizer, sentencepiece_source
from tokenizers import processors
from transformers import LlamaConfig

from factorctl.errors import UsageError
from factorctl.exporting.gguf.special import SpecialTokens
from factorctl.exporting.gguf.tokenizer import GgufTokenizer, read_tokenizer
from factorctl.exporting.gguf.vocabulary import TokenTable, pieces_of_merges, pieces_of_model

EOS = 2
IM_START, IM_END = 267, 268
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def edit(path: Path, **changes: Any) -> None:
    """Set the fields of a JSON file; None removes one."""
    value = json.loads(path.read_text()) if path.is_file() else {}
    value = {key: item for key, item in {**value, **changes}.items() if item is not None}
    path.write_text(json.dumps(value))


def read(directory: Path, config: Mapping[str, Any] | None = None) -> GgufTokenizer:
    dense = None if config is None else LlamaConfig(**{"eos_token_id": None, "bos_token_id": None, **config})
    return read_tokenizer(directory, vocab_size=GGUF_VOCAB, config=dense)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_eos_from_any_file_that_may_name_it(directory: Path) -> None:
    assert read(directory).special.ids["eos"] == EOS
    edit(directory / "tokenizer_config.json", eos_token=None)
    files = {
        "special_tokens_map.json": {"eos_token": "</s>"},
        "generation_config.json": {"eos_token_id": EOS},
    }
    for name, fields in files.items():
        edit(directory / name, **fields)
        assert read(directory).special.ids["eos"] == EOS, name
        (directory / name).unlink()
    edit(directory / "special_tokens_map.json", eos_token={"content": "</s>", "lstrip": False})
    edit(directory / "tokenizer_config.json", added_tokens_decoder={"2": {"content": "</s>", "special": True}})
    assert read(directory).special.ids["eos"] == EOS
    (directory / "special_tokens_map.json").unlink()
    assert read(directory, {"eos_token_id": EOS}).special.ids["eos"] == EOS


def test_a_model_without_an_end_of_text_is_refused(directory: Path) -> None:
    edit(directory / "tokenizer_config.json", eos_token=None)
    with pytest.raises(
        UsageError, match=r"names an end-of-text token, and llama\.cpp then takes an ordinary"
    ) as refusal:
        read(directory)
    assert """put "eos_token" into the source's tokenizer_config.json""" in str(refusal.value.hint)


def test_further_ends_of_text_come_from_the_generation_config_and_the_template(directory: Path) -> None:
    edit(directory / "added_tokens.json", **{"<|im_start|>": IM_START, "<|im_end|>": IM_END})
    edit(directory / "special_tokens_map.json", additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    plain = read(directory).special
    assert plain.ends == (EOS,)
    assert plain.control >= {IM_START, IM_END}
    edit(directory / "generation_config.json", eos_token_id=[IM_END, EOS, 77])
    special = read(directory).special
    assert special.ends == (EOS, IM_END)  # 77 is an ordinary token
    assert (special.ids["eos"], special.ids["eot"]) == (EOS, IM_END)
    (directory / "generation_config.json").unlink()
    (directory / "chat_template.jinja").write_text(CHATML)
    assert read(directory).special.ids["eot"] == IM_END


def test_added_tokens_get_a_row_from_whatever_file_they_stand_in(directory: Path) -> None:
    edit(directory / "added_tokens.json", **{"<tool>": IM_START})
    edit(directory / "special_tokens_map.json", additional_special_tokens=["<tool>"])
    found = read(directory)
    assert found.tokens[IM_START] == "<tool>"
    assert found.types[IM_START] == TokenType.CONTROL


def test_an_added_token_beyond_the_embedding_is_left_out_unless_the_chat_template_uses_it(directory: Path) -> None:
    edit(directory / "added_tokens.json", **{"[EXTRA]": IM_START})
    tokenizer = read_tokenizer(directory, vocab_size=IM_START)
    assert tokenizer.special.left_out == ("[EXTRA]",)
    assert len(tokenizer.tokens) == IM_START
    (directory / "chat_template.jinja").write_text("[EXTRA]" + CHATML)
    with pytest.raises(UsageError, match=r"the chat template uses '\[EXTRA\]', but the model embeds only 267 tokens"):
        read_tokenizer(directory, vocab_size=IM_START)


@pytest.mark.parametrize(
    ("single", "bos", "eos"), [("<s> $A", True, False), ("$A </s>", False, True), ("<s> $A </s>", True, True)]
)
def test_what_the_tokenizer_adds_is_seen_without_a_letter(single: str, bos: bool, eos: bool, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    ids = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    tokenizer.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = {token: index for token, index in raw["model"]["vocab"].items() if "a" not in token or index < 4}
    raw["model"] |= {"vocab": vocab, "merges": [pair for pair in raw["model"]["merges"] if "a" not in "".join(pair)]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    found = read(tmp_path)
    assert (found.special.adds_bos, found.special.adds_eos) == (bos, eos)
    assert found.missing_bytes == {ord("a")}


def test_two_tokens_in_front_are_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    ids = [("<s>", 1), ("<unk>", 3)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <unk> $A", special_tokens=ids
    )
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"adds 2 special tokens to a text; llama\.cpp adds one in front"):
        read(tmp_path)


def test_no_two_rows_are_called_alike() -> None:
    table = TokenTable(3)
    table.place(0, "[PAD2]", TokenType.NORMAL)
    assert table.names() == ["[PAD2]", "[PAD1]", "[[PAD2]]"]


def test_scores_come_back_from_the_merges(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece", reason="tokenizer.model is read by sentencepiece, which is not installed")
    source = sentencepiece_source(tmp_path / "dense")
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    exact = {piece.index: piece for piece in pieces_of_model(source / "tokenizer.model")}
    made = {"".join(pair) for pair in model["merges"]}
    rebuilt = pieces_of_merges(model)
    assert len(made) > 50
    assert len(rebuilt) == len(exact)
    for piece in rebuilt:
        known = exact[piece.index]
        assert piece.text == known.text
        assert piece.score == known.score or piece.text not in made
        assert piece.kind == known.kind or known.kind == TokenType.CONTROL  # which added_tokens says


def test_without_tokenizer_model_the_tokenizer_is_rebuilt(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece", reason="tokenizer.model is read by sentencepiece, which is not installed")
    source = sentencepiece_source(tmp_path / "dense")
    original = read_tokenizer(source, vocab_size=424)
    (source / "tokenizer.model").unlink()
    rebuilt = read_tokenizer(source, vocab_size=424)
    assert (original.is_rebuilt, rebuilt.is_rebuilt) == (False, True)
    assert rebuilt.types == original.types
    assert rebuilt.tokens == original.tokens
    assert rebuilt.special == original.special
    assert isinstance(rebuilt.special, SpecialTokens)
