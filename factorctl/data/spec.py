"""What DATA on the command line means: one or more sources of text, with weights.

    self                            text sampled from the dense model
    notes.txt  corpus.jsonl.xz  d/  a local file, plain or compressed, or a folder of them
    user/name[:config][@revision]   a Hub dataset, split `train`, streamed
    A,B      A=0.7,B=0.3            several of these, in equal shares or in the shares given
    A:domain!=code+textbook         only some of its rows: `row_filter`

Nothing is opened here and no network is used; only the presence of local paths is looked at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from factorctl.data.row_filter import RowFilter, split_filter
from factorctl.errors import UsageError

DEFAULT_PRETRAINING_DATA = "HuggingFaceFW/fineweb-edu:sample-10BT"
"""A maintained parquet sample of web text for finetuning; its revision is resolved and recorded at each build."""

FORMATS = (".txt", ".jsonl", ".json", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""What `datasets` writes beside the files of text."""
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> the words by which files of the Hub's data sets name it."""
_SPLIT_OF = {word: split for split, words in _SPLIT_WORDS.items() for word in words}
_WORD = re.compile(r"[a-z]+")
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<config>[^@\s]+))?(?:@(?P<revision>\S+))?")
_DESCRIPTION = "a local file or folder, a Hub dataset user/name[:config][@revision], or self"


@dataclass(frozen=True)
class SelfSource:
    """Text sampled from the dense model itself."""

    name: str = "self"


@dataclass(frozen=True)
class FileSource:
    """A local file, or a folder searched for text files at every depth."""

    name: str
    """As the user wrote it."""
    root: Path
    """The folder, or the folder that holds the one file."""
    files: tuple[str, ...]
    """Paths relative to `root`, with forward slashes, sorted."""
    left_out: tuple[str, ...] = ()
    """Files of a folder that hold its test and validation splits, beside those of its training split."""
    rows: RowFilter | None = None
    """Which rows are read; None means all."""

    @property
    def odd_splits(self) -> tuple[str, ...]:
        """Files of a folder that are read although they are named as test or validation splits."""
        several = self.files if Path(split_filter(self.name)[0]).expanduser().is_dir() else ()
        return tuple(name for name in several if split_of(name) in ("test", "validation"))


@dataclass(frozen=True)
class HubSource:
    """A dataset on the Hugging Face Hub."""

    name: str
    repo: str
    config: str | None = None
    revision: str | None = None
    """Branch, tag or commit as asked for; a commit once `pin_revisions` has run."""
    rows: RowFilter | None = None
    """Which rows are read; None means all."""


TextSource = SelfSource | FileSource | HubSource


@dataclass(frozen=True)
class DataSpec:
    """Parsed DATA: what to read and in which shares."""

    sources: tuple[TextSource, ...]
    weights: tuple[float, ...]
    """Shares of the text (in characters) taken from each source; they sum to 1."""
    text_field: str | None = None
    """Field of JSON and parquet rows that holds the text, dots leading into objects; None means `text`, else a
    conversation, else the only string field."""

    @property
    def uses_self(self) -> bool:
        return any(isinstance(source, SelfSource) for source in self.sources)

    @property
    def self_share(self) -> float:
        """The share of `self` in the text, 0 where it is not used."""
        return sum(w for s, w in zip(self.sources, self.weights, strict=True) if isinstance(s, SelfSource))


def parse_data_spec(text: str, *, text_field: str | None = None, option: str = "--data") -> DataSpec:
    """Read DATA. A path that exists locally wins over any other meaning.

    >>> parse_data_spec("self").sources
    (SelfSource(name='self'),)

    Raises:
        UsageError: naming the part that nothing matches and what was tried, or the weight at fault.
    """
    if not text.strip():
        raise UsageError(f"{option} is empty", f"give {_DESCRIPTION}")
    if Path(text).expanduser().exists():
        return DataSpec((_local_source(text, text, None, option),), (1.0,), text_field)
    parts = [_split_weight(part.strip(), option) for part in text.split(",")]
    names = [name for name, _ in parts]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise UsageError(f"{option} names '{repeated}' twice", f"name it once, with its whole weight: {repeated}=0.5")
    sources = tuple(_parse_source(name, option) for name in names)
    return DataSpec(sources, _shares([weight for _, weight in parts], names, option), text_field)


def format_suffix(name: str) -> str | None:
    """The data format of a file name without its compression: '.jsonl' for 'a.jsonl.xz'; None for other files."""
    path = Path(name.lower())
    if path.suffix in COMPRESSIONS:
        path = path.with_suffix("")
    return path.suffix if path.suffix in FORMATS else None


def _split_weight(part: str, option: str) -> tuple[str, float | None]:
    """'A=0.7' is ('A', 0.7); a name without weight, or a path that holds an '=', is (name, None)."""
    if not part:
        raise UsageError(f"{option} has an empty part between its commas", "separate sources by one comma: A,B")
    name, equals, number = part.rpartition("=")
    if not equals or Path(part).expanduser().exists() or _ends_in_filter(part):
        return part, None
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise UsageError(f"{option}: the weight '{number}' of '{name}' is not a number above 0", "write A=0.7,B=0.3")
    return name.strip(), weight


def _ends_in_filter(part: str) -> bool:
    """Whether what follows the last '=' is what a field must be, not a weight; A:config=0.7 of the Hub has a weight."""
    source, rows = split_filter(part)
    if rows is None or "=" in rows.values[-1]:
        return False
    return not rows.keeps or Path(source).expanduser().exists() or not re.fullmatch(r"[\d.]+", rows.values[-1])


def _shares(weights: Sequence[float | None], names: Sequence[str], option: str) -> tuple[float, ...]:
    given = [weight for weight in weights if weight is not None]
    if not given:
        return tuple(1 / len(weights) for _ in weights)
    if len(given) < len(weights):
        unweighted = names[list(weights).index(None)]
        raise UsageError(f"{option}: '{unweighted}' has no weight and others have", "give all a weight, or none")
    return tuple(weight / math.fsum(given) for weight in given)


def _parse_source(name: str, option: str) -> TextSource:
    place, rows = (name, None) if Path(name).expanduser().exists() else split_filter(name)
    if place == "self" and not Path(place).exists():
        if rows is not None:
            raise UsageError(f"{option} '{name}': text of `self` has no fields to choose by", "write `self` alone")
        return SelfSource()
    if Path(place).expanduser().exists():
        return _local_source(name, place, rows, option)
    match = _HUB_ID.fullmatch(place)
    if match and not place.startswith((".", "/", "~")) and format_suffix(place) is None:
        return HubSource(name, match["repo"], match["config"], match["revision"], rows)
    raise UsageError(
        f"{option} '{place}' was not found: no such file or folder, not a Hub dataset id (user/name), and not `self`",
        f"give {_DESCRIPTION}; several as A,B or A=0.7,B=0.3",
    )


def _local_source(name: str, place: str, rows: RowFilter | None, option: str) -> FileSource:
    path = Path(place).expanduser()
    if path.is_dir():
        files = sorted(
            found.relative_to(path).as_posix()
            for found in path.rglob("*")
            if _may_hold_text(found) and found.is_file() and not _is_hidden(found.relative_to(path))
        )
        if not files:
            raise UsageError(f"{option} '{place}' is a folder without text files", f"known are {_known_suffixes()}")
        return FileSource(name, path, *training_files(files), rows=rows)
    if format_suffix(path.name) is None:
        raise UsageError(
            f"{option} '{place}': files of type '{path.suffix}' are not read", f"known are {_known_suffixes()}"
        )
    return FileSource(name, path.parent, (path.name,), rows=rows)


def _may_hold_text(file: Path) -> bool:
    return format_suffix(file.name) is not None and file.name not in _METADATA


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _known_suffixes() -> str:
    return f"{', '.join(FORMATS)}, all but .parquet also with {', '.join(COMPRESSIONS)} behind it"


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
    """(read, left out): where files name a training split, those that name another one are left out.

    A cloned data set holds its splits side by side, `train-00000-of-00002.parquet` and `test-00000-of-00001.parquet`
    or `train/` and `validation/`. Streamed from the Hub only `train` is read, and a clone of it is the same text.
    """
    splits = {name: split_of(name) for name in files}
    if "train" not in splits.values():
        return tuple(files), ()
    read = tuple(name for name in files if splits[name] in ("train", None))
    return read, tuple(name for name in files if name not in read)
