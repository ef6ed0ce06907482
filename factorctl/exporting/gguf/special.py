"""A model's special tokens: which id is which, which of them end a text, and which the tokenizer adds by itself.

They may be named in tokenizer.json, tokenizer_config.json, special_tokens_map.json, added_tokens.json, config.json or
generation_config.json. transformers reads the first four into one tokenizer, which is asked here; what it leaves open
is looked up in the files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter
from transformers import PretrainedConfig

from factorctl.errors import UsageError
from factorctl.exporting.check.text import PASSAGES
from factorctl.exporting.gguf.chat_format import end_of_turn
from factorctl.files.strict_json import read_json_object

ROLES = ("bos", "eos", "unk", "sep", "pad", "mask")
_FURTHER_ENDS = ("eot", "eom")
"""Where GGUF keeps ends of text beside eos."""
_PROBE_CHARACTERS = 200
ELSEWHERE = "export with --to hf, or with --to dense where hf cannot hold the model"
"""What to do with a tokenizer that llama.cpp cannot run."""


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a tokenizer, by id."""

    ids: Mapping[str, int]
    """Role -> id, under GGUF's names: `bos`, `eos`, `eot` and so on."""
    adds_bos: bool
    adds_eos: bool
    added: Mapping[str, int]
    """Text -> id of every token that is matched in text before it is split, special or not."""
    control: frozenset[int]
    """Of `added`: those that carry no text."""
    ends: tuple[int, ...]
    """What ends a text: whoever generates one of these stops."""
    left_out: tuple[str, ...]
    """Added tokens beyond the embedding, which the model could not read either."""
    chat_template: str | Sequence[Mapping[str, str]] | None

    @property
    def unnamed_ends(self) -> list[int]:
        """Ends of text for which a GGUF file has no key: llama.cpp knows some by their text."""
        return [token for token in self.ends if token not in self.ids.values()]

    def add_to(self, writer: GGUFWriter) -> None:
        """Write the keys of the special tokens and of the chat template."""
        for role, token in self.ids.items():
            getattr(writer, f"add_{role}_token_id")(token)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_special_tokens(
    directory: Path, tokenizer: Any, config: PretrainedConfig | None, *, vocab_size: int
) -> SpecialTokens:
    """The special tokens of the model in `directory`, as `tokenizer` and the files beside it say.

    Args:
        config: the model's, for ids that only config.json gives.

    Raises:
        UsageError: nothing ends a text, the tokenizer adds what llama.cpp cannot add, or the chat template uses a
            token that the model does not embed.
    """
    added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if index < vocab_size}
    beyond = [str(token) for index, token in tokenizer.added_tokens_decoder.items() if index >= vocab_size]
    template = _chat_template(tokenizer)
    if used := [token for token in beyond if token in str(template)]:
        raise UsageError(
            f"the chat template uses {used[0]!r}, but the model embeds only {vocab_size} tokens and has none for it",
            "the tokenizer files belong to another model",
        )
    control = _control(directory, tokenizer, added)
    ids = _named(directory, tokenizer, config, vocab_size)
    first, last = _added_around(tokenizer)
    stops = [last, ids.get("eos"), *_further_ends(directory, config, control), end_of_turn(tokenizer, added)]
    ends = list(dict.fromkeys(token for token in stops if token is not None and 0 <= token < vocab_size))
    if not ends:
        raise UsageError(
            f"no file in {directory} names an end-of-text token, and llama.cpp then takes an ordinary token for it",
            f'put "eos_token" into the source\'s tokenizer_config.json and factorize it again; or {ELSEWHERE}',
        )
    ids |= dict(zip(("eos", *_FURTHER_ENDS), ends, strict=False))
    if first is not None:
        ids["bos"] = first
    return SpecialTokens(
        ids=ids,
        adds_bos=first is not None,
        adds_eos=last is not None,
        added=added,
        control=control,
        ends=tuple(ends),
        left_out=tuple(beyond),
        chat_template=template,
    )


def _control(directory: Path, tokenizer: Any, added: Mapping[str, int]) -> frozenset[int]:
    """Of the added tokens the special ones; those of special_tokens_map.json too, which transformers reads in part."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    for value in _json(directory / "special_tokens_map.json").values():
        for token in value if isinstance(value, list) else [value]:
            text = token.get("content") if isinstance(token, dict) else token
            special |= {added[text]} if isinstance(text, str) and text in added else set()
    return frozenset(special)


def _named(directory: Path, tokenizer: Any, config: PretrainedConfig | None, vocab_size: int) -> dict[str, int]:
    """Role -> id: as the tokenizer has it, else as special_tokens_map.json, generation_config.json or config.json."""
    texts, generation = _json(directory / "special_tokens_map.json"), _json(directory / "generation_config.json")
    found = {}
    for role in ROLES:
        named = [getattr(tokenizer, f"{role}_token_id", None), _id_of(tokenizer, texts.get(f"{role}_token"))]
        numbered = [
            *_as_list(generation.get(f"{role}_token_id")),
            *_as_list(getattr(config, f"{role}_token_id", None)),
        ]
        special = [token for token in numbered if token in tokenizer.added_tokens_decoder]
        last = numbered if role == "eos" else []  # generate() stops there, whatever token it is
        known = [token for token in [*named, *special, *last] if isinstance(token, int) and 0 <= token < vocab_size]
        if known:
            found[role] = known[0]
    return found


def _further_ends(directory: Path, config: PretrainedConfig | None, control: frozenset[int]) -> list[int]:
    """What generation_config.json or else config.json stops at beside eos; an ordinary token there is a leftover."""
    generation = _as_list(_json(directory / "generation_config.json").get("eos_token_id"))
    return [token for token in generation or _as_list(getattr(config, "eos_token_id", None)) if token in control]


def _added_around(tokenizer: Any) -> tuple[int | None, int | None]:
    """What the tokenizer puts (in front of, behind) a text.

    Raises:
        UsageError: more than one token on a side, or not always the same.
    """
    found = {_around(tokenizer, text) for text in PASSAGES} - {None}
    if not found:  # a vocabulary without letters: text of its own
        every = tokenizer.decode(list(range(len(tokenizer))), skip_special_tokens=True)
        found = {_around(tokenizer, every[:_PROBE_CHARACTERS])} - {None}
    if len(found) == 1:
        return next(around for around in found if around is not None)
    raise UsageError(
        "which special tokens the tokenizer adds to a text depends on the text; llama.cpp always adds the same",
        ELSEWHERE,
    )


def _around(tokenizer: Any, text: str) -> tuple[int | None, int | None] | None:
    """As `_added_around`, for one text; None where the text is no token, which tells nothing."""
    whole, plain = list(tokenizer(text)["input_ids"]), list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not plain:
        return None
    for start in range(len(whole) - len(plain) + 1):
        before, after = whole[:start], whole[start + len(plain) :]
        if whole[start : start + len(plain)] == plain and len(before) <= 1 and len(after) <= 1:
            return (before[0] if before else None), (after[0] if after else None)
    raise UsageError(
        f"the tokenizer adds {len(whole) - len(plain)} special tokens to a text; llama.cpp adds one in front and one "
        "behind",
        ELSEWHERE,
    )


def _chat_template(tokenizer: Any) -> str | list[dict[str, str]] | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template if isinstance(template, str) else None


def _id_of(tokenizer: Any, token: object) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    return tokenizer.get_vocab().get(text) if isinstance(text, str) else None


def _as_list(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool)]


def _json(path: Path) -> Mapping[str, Any]:
    return read_json_object(path) if path.is_file() else {}
