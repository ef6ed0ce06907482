"""The tokenizer of a GGUF file as Hugging Face files: its tokens and no others, split as llama.cpp splits text.

It is put together from the file's own keys: transformers' tokenizer classes add tokens that the model never had.
Sources: llama.cpp `src/llama-vocab.cpp` for pre-tokenizers, their defaults, and SentencePiece's merges by score.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from factorctl.checkpoint.gguf.header import GIVE_HF, GgufHeader
from factorctl.errors import UsageError, in_one_line

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_PUNCTUATION}"
QWEN2_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_PUNCTUATION}"

_FILLER = re.compile(r"\[PAD\d+\]")
"""What llama.cpp's converter names the rows of an embedding that no token has."""


@dataclass(frozen=True)
class _Splitting:
    """How text is cut into words before the merges, and what llama.cpp assumes along with it."""

    words: str | None = None
    """None: GPT-2's own expression."""
    single_digits: bool = False
    whole_words_first: bool = False
    """A word that is a token stays whole whatever the merges say."""
    composed: bool = False
    """Characters are brought into Unicode's composed form."""
    adds_bos: bool = False


_GPT2 = _Splitting()
_LLAMA3 = _Splitting(LLAMA3_WORDS, whole_words_first=True, adds_bos=True)
_QWEN2 = _Splitting(QWEN2_WORDS, composed=True)
PRE_TOKENIZERS: Mapping[str, _Splitting] = {
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "smollm": _Splitting(single_digits=True),
    "starcoder": _Splitting(single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
"""`tokenizer.ggml.pre` -> how it splits."""


class _Vocabulary:
    """The keys `tokenizer.*` of a file, checked against one another."""

    def __init__(self, header: GgufHeader) -> None:
        self.path = header.path
        self._keys = {
            key.removeprefix("tokenizer."): value for key, value in header.keys.items() if key.startswith("tokenizer.")
        }
        tokens = self._keys.get("ggml.tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise UsageError(f"{self.path} carries no tokenizer (tokenizer.ggml.tokens)", GIVE_HF)
        self.tokens: list[str] = tokens
        self.types: list[int] = self._keys.get("ggml.token_type") or [int(TokenType.NORMAL)] * len(tokens)
        if len(self.types) != len(tokens):
            raise UsageError(
                f"{self.path} lists {len(tokens)} tokens and {len(self.types)} types of them", "fetch the file again"
            )

    def get(self, key: str, default: Any = None) -> Any:
        return self._keys.get(key, default)

    def token(self, role: str) -> str | None:
        """The token of a role ('bos'), or None where the file names none.

        Raises:
            UsageError: it names an id that no row of the embedding has.
        """
        index = self._keys.get(f"ggml.{role}_token_id")
        if index is None or index == 2**32 - 1:  # llama.cpp's "none"
            return None
        if not 0 <= int(index) < len(self.tokens):
            if role == "padding":  # no text holds it
                return None
            raise UsageError(
                f"{self.path} sets tokenizer.ggml.{role}_token_id = {index}; the model has {len(self.tokens)} tokens",
                GIVE_HF,
            )
        return self.tokens[int(index)]

    def ids(self) -> dict[str, int]:
        """Token -> id, without the filler of rows that no token has."""
        filler = {
            index
            for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind == TokenType.UNUSED and _FILLER.fullmatch(token)
        }
        return {token: index for index, token in enumerate(self.tokens) if index not in filler}

    def of_type(self, kind: TokenType) -> list[str]:
        return [token for token, found in zip(self.tokens, self.types, strict=True) if found == kind]


def write_tokenizer(header: GgufHeader, directory: Path) -> list[str]:
    """Write tokenizer.json and what belongs to it; returns remarks for the user.

    Raises:
        UsageError: the file's tokenizer is none that can be put together exactly, with the key at fault.
    """
    vocabulary = _Vocabulary(header)
    remarks: list[str] = []
    kind = vocabulary.get("ggml.model")
    try:
        if kind == "gpt2":
            tokenizer, adds_bos = _byte_level(vocabulary, remarks)
        elif kind == "llama":
            tokenizer, adds_bos = _sentencepiece(vocabulary), True
        else:
            raise UsageError(
                f"{header.path} has a tokenizer of kind tokenizer.ggml.model = {kind!r}; gpt2 and llama are read",
                GIVE_HF,
            )
        _add_tokens(tokenizer, vocabulary)
        _add_ends(tokenizer, vocabulary, adds_bos=adds_bos)
    except UsageError:
        raise
    except Exception as error:  # tokenizers raises plain exceptions for merges and tokens that do not fit
        raise UsageError(f"the tokenizer in {header.path} cannot be read: {in_one_line(error)}", GIVE_HF) from error
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    named = {field: vocabulary.token(role) for field, role in roles.items()}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        **{k: v for k, v in named.items() if v is not None},
    )
    fast.chat_template = _chat_templates(vocabulary)
    fast.save_pretrained(directory)
    return remarks


def end_tokens(header: GgufHeader) -> list[int]:
    """The ids at which generation ends: end of text, then those of turn and message, as llama.cpp takes them."""
    found = [header.keys.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    count = len(header.keys.get("tokenizer.ggml.tokens", ()))
    return list(dict.fromkeys(int(index) for index in found if index is not None and 0 <= int(index) < count))


def _byte_level(vocabulary: _Vocabulary, remarks: list[str]) -> tuple[Tokenizer, bool]:
    name = vocabulary.get("ggml.pre", "default")
    if name == "default":
        remarks.append(
            f"{vocabulary.path.name} names no pre-tokenizer (tokenizer.ggml.pre): text is split as GPT-2 does it"
        )
        name = "gpt-2"
    if name not in PRE_TOKENIZERS:
        raise UsageError(
            f"{vocabulary.path} splits text by tokenizer.ggml.pre = {name!r}, which is not known here",
            f"known: {', '.join(PRE_TOKENIZERS)}; {GIVE_HF}",
        )
    splitting = PRE_TOKENIZERS[name]
    merges = [tuple(merge.split(" ", 1)) for merge in _listed(vocabulary.get("ggml.merges"))]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary.ids(), merges=merges, ignore_merges=splitting.whole_words_first)  # type: ignore[arg-type]
    )
    if splitting.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(splitting)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, splitting.adds_bos


def _listed(merges: Any) -> Sequence[str]:
    return [merges] if isinstance(merges, str) else merges or []


def _pre_tokenizer(splitting: _Splitting) -> Any:
    if splitting.words is not None:
        split = pre_tokenizers.Split(Regex(splitting.words), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(True), bytes_]) if splitting.single_digits else bytes_


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    ids, scores = vocabulary.ids(), vocabulary.get("ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary.tokens):
        raise UsageError(f"{vocabulary.path} lacks the scores of its tokens (tokenizer.ggml.scores)", GIVE_HF)
    unknown = vocabulary.token("unknown") or next(iter(vocabulary.of_type(TokenType.UNKNOWN)), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges_by_score(vocabulary, ids, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=bool(vocabulary.of_type(TokenType.BYTE)),
        )
    )
    prefixed = bool(vocabulary.get("ggml.add_space_prefix", True))
    steps: list[Any] = [normalizers.Prepend("▁")] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    ends: list[Any] = [decoders.Strip(content=" ", left=1)] if prefixed else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    return tokenizer


def _merges_by_score(vocabulary: _Vocabulary, ids: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Pairs of pieces that join to a piece, the best score first: the order in which SentencePiece joins them."""
    normal = [token for token in ids if vocabulary.types[ids[token]] == TokenType.NORMAL and len(token) > 1]
    normal.sort(key=lambda token: (-scores[ids[token]], ids[token]))
    joined: list[tuple[str, str]] = []
    for token in normal:
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [(left, right) for left, right in pairs if left in ids and right in ids]
        joined += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return joined


def _add_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Mark the tokens that text is cut at first; each is in the vocabulary already and keeps its id."""
    special = [*vocabulary.of_type(TokenType.CONTROL), *vocabulary.of_type(TokenType.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    plain = vocabulary.of_type(TokenType.USER_DEFINED)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])


def _add_ends(tokenizer: Tokenizer, vocabulary: _Vocabulary, *, adds_bos: bool) -> None:
    """BOS before and EOS behind each text, where the file says so or llama.cpp does it unsaid."""
    bos = vocabulary.token("bos") if vocabulary.get("ggml.add_bos_token", adds_bos) else None
    eos = vocabulary.token("eos") if vocabulary.get("ggml.add_eos_token", False) else None
    ids = vocabulary.ids()
    before, after = [bos] if bos else [], [eos] if eos else []
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *before, "$B:1", *after],
            special_tokens=[(token, ids[token]) for token in dict.fromkeys([*before, *after])],
        )


def _chat_templates(vocabulary: _Vocabulary) -> str | dict[str, str] | None:
    """The template, or all by name where the file has several."""
    default = vocabulary.get("chat_template")
    named = {name: vocabulary.get(f"chat_template.{name}") for name in _listed(vocabulary.get("chat_templates"))}
    named = {name: template for name, template in named.items() if template}
    if not named:
        return default if default is None else str(default)
    return {**({"default": default} if default else {}), **named}
