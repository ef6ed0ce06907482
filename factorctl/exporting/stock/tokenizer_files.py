"""tokenizer_config.json in words that transformers 4 and 5 both know.

transformers 5 names its own base class, `TokenizersBackend`, where tokenizer.json alone describes a tokenizer; and it
lists further special tokens as `extra_special_tokens`. transformers 4 refuses the name and fails on the list. Both know
`PreTrainedTokenizerFast` and `additional_special_tokens`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from factorctl.files.strict_json import dump_json, read_json_object

CONFIG_NAME = "tokenizer_config.json"
PORTABLE_CLASS = "PreTrainedTokenizerFast"
_NEW_CLASSES = frozenset({"TokenizersBackend", "PythonBackend", "SentencePieceBackend"})
_OF_ONE_LOADING = frozenset({"backend", "is_local", "local_files_only"})
"""What transformers 5 wrote down of how it had loaded the tokenizer before it saved it."""


def portable_bytes(path: Path) -> bytes:
    """The file as it is, unless it is a tokenizer_config.json that only transformers 5 reads."""
    if path.name != CONFIG_NAME:
        return path.read_bytes()
    raw = read_json_object(path)
    portable = portable_config(raw, has_tokenizer_json=(path.parent / "tokenizer.json").is_file())
    return path.read_bytes() if portable == raw else dump_json(portable)


def portable_config(raw: dict[str, Any], *, has_tokenizer_json: bool) -> dict[str, Any]:
    """`raw` with what transformers 5 alone knows said in the older words; unchanged where there is nothing of it."""
    config = dict(raw)
    if config.get("tokenizer_class") in _NEW_CLASSES and has_tokenizer_json:
        config["tokenizer_class"] = PORTABLE_CLASS
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list):
        del config["extra_special_tokens"]
        if extra:
            config["additional_special_tokens"] = [*config.get("additional_special_tokens", []), *extra]
    if config != raw or "backend" in raw:
        config = {key: value for key, value in config.items() if key not in _OF_ONE_LOADING}
    return config
