"""Which split a file of a data set belongs to, by the names that the Hub's data sets go by.

A cloned data set holds its splits side by side, `train-00000-of-00002.parquet` and `test-00000-of-00001.parquet` or
`train/` and `validation/`. Streamed from the Hub only `train` is read, and a clone of it is the same text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _WORDS.items() for word in words}
_WORD = re.compile(r"[a-z]+")


def split_of(name: str) -> str | None:
    """'train', 'validation' or 'test' for a path inside of a data set; None where no part of it names a split.

    >>> split_of("data/test-00000-of-00001.parquet"), split_of("validation/a.jsonl.gz"), split_of("latest.txt")
    ('test', 'validation', None)
    """
    path = PurePosixPath(name.lower())
    for part in (path.name.partition(".")[0], *reversed(path.parts[:-1])):
        words = _WORD.findall(part)
        splits = [_SPLIT_OF[word] for word in words if word in _SPLIT_OF]
        if splits:
            return splits[0]
    return None


def training_files(files: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(read, left out): where files name a training split, those that name another one are left out."""
    splits = {name: split_of(name) for name in files}
    if "train" not in splits.values():
        return tuple(files), ()
    read = tuple(name for name in files if splits[name] in ("train", None))
    return read, tuple(name for name in files if name not in read)
