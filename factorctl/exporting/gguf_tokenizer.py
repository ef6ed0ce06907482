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
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from tokenizers import Tokenizer

from factorctl.checkpoint.strict_json import read_json_object
from factorctl.errors import FactorctlError, UsageError, in_one_line

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_PUNCTUATION}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_PUNCTUATION}"


def _step(kind: str, *details: object) -> str:
    return " ".join([kind, *map(str, details)])


PRE_TOKENIZERS: Mapping[tuple[str, ...], str] = {
    (_step("ByteLevel", "regex"),): "gpt-2",
    (_step("Digits", True), _step("ByteLevel", "regex")): "smollm",
    (_step("Split", _LLAMA3), _step("ByteLevel"), "ignore_merges"): "llama-bpe",
    ("NFC", _step("Split", _QWEN2), _step("ByteLevel")): "qwen2",
}
"""Normaliser and pre-tokenizer, step by step -> llama.cpp's name."""


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer in GGUF's terms; `tokens` has one entry per row of the embedding."""

    model: str
    pre: str | None
    tokens: list[str]
    types: list[int]
    special: SpecialVocab
    scores: list[float] | None = None

    def add_to(self, writer: GGUFWriter) -> None:
        """Write the keys `tokenizer.*`."""
        writer.add_tokenizer_model(self.model)
        if self.pre is not None:
            writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        self.special.add_to_gguf(writer, quiet=True)


def read_tokenizer(directory: Path, *, vocab_size: int) -> GgufTokenizer:
    """The tokenizer of a checkpoint directory.

    Raises:
        UsageError: there is none that llama.cpp could run, with the reason.
    """
    try:
        return _read(directory, vocab_size)
    except FactorctlError:
        raise
    except Exception as error:  # a damaged tokenizer.json fails wherever its parts are looked at
        raise UsageError(
            f"the tokenizer files in {directory} are damaged: {in_one_line(error)}",
            "fetch the model's tokenizer files again, or export with --to hf",
        ) from error


def _read(directory: Path, vocab_size: int) -> GgufTokenizer:
    path = directory / "tokenizer.json"
    raw = read_json_object(path) if path.is_file() else None
    if raw is not None and raw.get("model", {}).get("type") == "BPE" and not raw["model"].get("byte_fallback"):
        return _byte_level(directory, raw, vocab_size)
    if (directory / "tokenizer.model").is_file():
        return _sentencepiece(directory, raw, vocab_size)
    if raw is None:
        raise UsageError(
            f"{directory} has neither tokenizer.json nor tokenizer.model, and a GGUF file carries its tokenizer",
            "add the model's tokenizer files, or export with --to hf",
        )
    raise UsageError(
        f"{path} holds a {raw.get('model', {}).get('type')} tokenizer with byte fallback; its scores are in "
        "tokenizer.model, which is missing",
        "add the source's tokenizer.model, or export with --to hf",
    )


def _byte_level(directory: Path, raw: Mapping[str, Any], vocab_size: int) -> GgufTokenizer:
    tokens, types = _padded(vocab_size)
    for token, index in raw["model"]["vocab"].items():
        _place(tokens, types, index, token, TokenType.NORMAL)
    _place_added(tokens, types, raw)
    if not raw["model"].get("merges"):
        raise UsageError("the tokenizer has no merges, and llama.cpp takes none without", "export with --to hf")
    special = SpecialVocab(directory, load_merges=True, n_vocab=vocab_size)
    _add_special_as_the_tokenizer_does(directory, special)
    return GgufTokenizer("gpt2", pre_tokenizer(raw), tokens, types, special)


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


def _sentencepiece(directory: Path, raw: Mapping[str, Any] | None, vocab_size: int) -> GgufTokenizer:
    pieces = _sentencepiece_model(directory / "tokenizer.model")
    tokens, types = _padded(vocab_size)
    scores = [-10000.0] * vocab_size
    for index in range(pieces.vocab_size()):
        kind = TokenType.NORMAL
        if pieces.IsUnknown(index):
            kind = TokenType.UNKNOWN
        elif pieces.IsControl(index):
            kind = TokenType.CONTROL
        elif pieces.IsByte(index):
            kind = TokenType.BYTE
        _place(tokens, types, index, pieces.IdToPiece(index), kind)
        scores[index] = pieces.GetScore(index)
    if raw is not None:
        _place_added(tokens, types, raw, after=pieces.vocab_size())
    special = SpecialVocab(directory, n_vocab=vocab_size)
    _add_special_as_the_tokenizer_does(directory, special)
    return GgufTokenizer("llama", "default", tokens, types, special, scores)


def _sentencepiece_model(path: Path) -> Any:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise UsageError(
            f"{path} is a SentencePiece model, and the package sentencepiece is not installed",
            "pip install sentencepiece",
        ) from None
    processor = SentencePieceProcessor()
    processor.LoadFromFile(str(path))
    return processor


def _padded(vocab_size: int) -> tuple[list[str], list[int]]:
    """As many tokens as the embedding has rows; those that the tokenizer does not know stay unused."""
    return [f"[PAD{index}]" for index in range(vocab_size)], [int(TokenType.UNUSED)] * vocab_size


def _place_added(tokens: list[str], types: list[int], raw: Mapping[str, Any], after: int = 0) -> None:
    for token in raw.get("added_tokens") or []:
        if token["id"] >= after:
            kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
            _place(tokens, types, token["id"], token["content"], kind)


def _place(tokens: list[str], types: list[int], index: int, token: str, kind: TokenType) -> None:
    if not isinstance(token, str) or index < 0:
        raise UsageError(f"the tokenizer has the id {index} for {str(token)[:80]!r}", "its files are damaged")
    if index >= len(tokens):
        raise UsageError(
            f"the tokenizer has an id {index} ({token!r}), but the model embeds only {len(tokens)} tokens",
            "the tokenizer files belong to another model",
        )
    tokens[index], types[index] = token, int(kind)


def _add_special_as_the_tokenizer_does(directory: Path, special: SpecialVocab) -> None:
    """Whether BOS and EOS are added, found by encoding a letter: llama.cpp's defaults differ between names."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return
    ids = Tokenizer.from_file(str(path)).encode("a").ids
    bos, eos = special.special_token_ids.get("bos"), special.special_token_ids.get("eos")
    special.add_special_token["bos"] = len(ids) > 1 and ids[0] == bos
    special.add_special_token["eos"] = len(ids) > 1 and ids[-1] == eos
