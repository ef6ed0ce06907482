"""A Hugging Face tokenizer as GGUF keys.

Byte-level BPE comes from tokenizer.json, SentencePiece from tokenizer.model. llama.cpp splits text into words by
regular expressions that it knows by name (`tokenizer.ggml.pre`) and not from the file; so the name is chosen by the
normaliser and pre-tokenizer that tokenizer.json spells out, and one that is not in the table is refused, not guessed.
Source of the names: llama.cpp `src/llama-vocab.cpp`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from factorctl.checkpoint.gguf.vocabulary import LLAMA3_WORDS, QWEN2_WORDS
from factorctl.errors import FactorctlError, UsageError, in_one_line
from factorctl.exporting.check.text import PASSAGES
from factorctl.exporting.gguf.chat_format import ChatFormat, chat_format
from factorctl.exporting.gguf.special import ELSEWHERE, SpecialTokens, read_special_tokens
from factorctl.exporting.gguf.vocabulary import TokenTable, pieces_of_merges, pieces_of_model
from factorctl.files.strict_json import read_json_object


def _step(kind: str, *details: object) -> str:
    return " ".join([kind, *map(str, details)])


PRE_TOKENIZERS: Mapping[tuple[str, ...], str] = {
    (_step("ByteLevel", "regex"),): "gpt-2",
    (_step("Digits", True), _step("ByteLevel", "regex")): "smollm",
    (_step("Split", LLAMA3_WORDS), _step("ByteLevel"), "ignore_merges"): "llama-bpe",
    ("NFC", _step("Split", QWEN2_WORDS), _step("ByteLevel")): "qwen2",
}
"""Normaliser and pre-tokenizer, step by step -> llama.cpp's name."""


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer in GGUF's terms; `tokens` has one entry per row of the embedding."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    original: PreTrainedTokenizerBase
    """What it was made of, as transformers reads it."""
    special: SpecialTokens
    chat: ChatFormat | None
    """The chat template as text around messages, where it is no more than that."""
    merges: list[str] | None = None
    scores: list[float] | None = None
    space_prefix: bool | None = None
    """Whether a text is read as if a space stood before it; only SentencePiece asks."""
    is_rebuilt: bool = False
    """Whether scores were derived from merges: then llama.cpp itself has to say that they serve."""

    @cached_property
    def missing_bytes(self) -> frozenset[int]:
        """Bytes that a byte-level vocabulary has no token for: mostly such as UTF-8 does not use."""
        if self.model != "gpt2":
            return frozenset()
        known = set(self.tokens)
        return frozenset(byte for byte, token in bytes_to_unicode().items() if token not in known)

    def add_to(self, writer: GGUFWriter) -> None:
        """Write the keys `tokenizer.*`."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.space_prefix is not None:
            writer.add_add_space_prefix(self.space_prefix)
        self.special.add_to(writer)


def read_tokenizer(directory: Path, *, vocab_size: int, config: PretrainedConfig | None = None) -> GgufTokenizer:
    """The tokenizer of a checkpoint directory.

    Args:
        config: the dense model's, for special tokens that no file of the tokenizer names.

    Raises:
        UsageError: there is none that llama.cpp could run, with the reason.
    """
    try:
        return _read(directory, vocab_size, config)
    except FactorctlError:
        raise
    except Exception as error:  # a damaged tokenizer.json fails wherever its parts are looked at
        raise UsageError(
            f"the tokenizer files in {directory} are damaged: {in_one_line(error)}",
            f"fetch the model's tokenizer files again; or {ELSEWHERE}",
        ) from error


def _read(directory: Path, vocab_size: int, config: PretrainedConfig | None) -> GgufTokenizer:
    path, pieces = directory / "tokenizer.json", directory / "tokenizer.model"
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UsageError(
            f"{directory} has neither tokenizer.json nor tokenizer.model, and a GGUF file carries its tokenizer",
            f"add the model's tokenizer files; or {ELSEWHERE}",
        )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    raw = read_json_object(path) if path.is_file() else json.loads(tokenizer.backend_tokenizer.to_str())
    model, table = raw.get("model", {}), TokenTable(vocab_size)
    is_byte_level = model.get("type") == "BPE" and not model.get("byte_fallback")
    if not is_byte_level and not pieces.is_file() and not (model.get("type") == "BPE" and model.get("byte_fallback")):
        raise UsageError(
            f"{path} holds a {model.get('type')} tokenizer; llama.cpp takes BPE, byte-level or of SentencePiece",
            f"add the source's tokenizer.model if it has one; or {ELSEWHERE}",
        )
    special = read_special_tokens(directory, tokenizer, config, vocab_size=vocab_size)
    if is_byte_level:
        kind: dict[str, Any] = {"model": "gpt2", "pre": pre_tokenizer(raw), "merges": _merges(model)}
        for token, index in model["vocab"].items():
            table.place(index, token, TokenType.NORMAL)
    else:
        found = pieces_of_model(pieces) if pieces.is_file() else pieces_of_merges(model)
        table.place_all(found)
        kind = {"model": "llama", "pre": "default", "scores": table.scores, "is_rebuilt": not pieces.is_file()}
        kind["space_prefix"] = tokenizer.tokenize(PASSAGES[0])[0].startswith("▁")
    table.place_added(special)
    return GgufTokenizer(
        tokens=table.names(),
        types=table.types,
        original=tokenizer,
        special=special,
        chat=chat_format(tokenizer),
        **kind,
    )


def _merges(model: Mapping[str, Any]) -> list[str]:
    """Merges as GGUF spells them: "left right", a space within either side as byte-level BPE spells it.

    Raises:
        UsageError: there are none.
    """
    if not model.get("merges"):
        raise UsageError("the tokenizer has no merges, and llama.cpp takes none without", ELSEWHERE)
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return [" ".join(side.replace(" ", "Ġ") for side in pair) for pair in pairs]


def pre_tokenizer(raw: Mapping[str, Any]) -> str:
    """llama.cpp's name for the normaliser and pre-tokenizer of a tokenizer.json.

    Raises:
        UsageError: not in the table.
    """
    steps = [*_steps(raw.get("normalizer"), "normalizers"), *_steps(raw.get("pre_tokenizer"), "pretokenizers")]
    if raw["model"].get("ignore_merges"):
        steps.append("ignore_merges")
    if tuple(steps) not in PRE_TOKENIZERS:
        raise UsageError(
            f"llama.cpp's name for this pre-tokenizer is not known here: {json.dumps(steps)}",
            f"known: {', '.join(PRE_TOKENIZERS.values())}; export with --to hf and convert that directory with "
            "llama.cpp's convert_hf_to_gguf.py",
        )
    return PRE_TOKENIZERS[tuple(steps)]


def _steps(part: Mapping[str, Any] | None, key: str) -> list[str]:
    """A normaliser or pre-tokenizer as one line per step, without what does not change the split."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [line for step in part[key] for line in _steps(step, key)]
    if part["type"] == "ByteLevel" and not part.get("add_prefix_space"):
        return [_step("ByteLevel", "regex") if part.get("use_regex", True) else _step("ByteLevel")]
    if part["type"] == "Digits":
        return [_step("Digits", part["individual_digits"])]
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return [_step("Split", part["pattern"].get("Regex") or part["pattern"].get("String"))]
    details = {name: value for name, value in part.items() if name != "type"}
    return [_step(part["type"], json.dumps(details, sort_keys=True))] if details else [part["type"]]
