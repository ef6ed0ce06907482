"""Text out of local .txt, .jsonl, .json and .parquet files, one document at a time.

A .jsonl line, a .json array item and a .parquet row is one document. A .txt file is cut into documents of about
32 thousand characters at blank lines, so that a whole book in one file can still be split into training and held-out
documents. Every fault names the file and the line.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, cast

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from factorctl.data.documents import Document
from factorctl.data.spec import COMPRESSIONS, format_suffix
from factorctl.data.text_field import choose_text_field, text_of
from factorctl.errors import IntegrityError, UsageError

PIECE_CHARACTERS = 32_768
"""A .txt document ends at the first blank line after this many characters, at any line after twice as many."""
_PARQUET_BATCH_ROWS = 256


def read_file(path: Path, name: str, source: str, text_field: str | None) -> Iterator[Document]:
    """The documents of one file in their order; `id` is 'name:line' (item or row for .json and .parquet).

    Raises:
        UsageError: the file cannot be opened, or a row lacks the text field.
        IntegrityError: corrupt or truncated compression, bad UTF-8, JSON or parquet.
    """
    suffix = format_suffix(path.name)
    if suffix == ".txt":
        numbered = _text_pieces(path)
    elif suffix == ".parquet":
        numbered = _parquet_texts(path, text_field)
    elif suffix == ".json" and _starts_with_bracket(path):
        numbered = _json_array_texts(path, text_field)
    else:
        numbered = _json_line_texts(path, text_field)
    for number, text in numbered:
        if text.strip():
            yield Document(text=text, source=source, id=f"{name}:{number}")


def _text_pieces(path: Path) -> Iterator[tuple[int, str]]:
    piece: list[str] = []
    start, characters = 1, 0
    for number, line in _lines(path):
        for offset in range(0, len(line), PIECE_CHARACTERS):
            part = line[offset : offset + PIECE_CHARACTERS]
            full = characters >= 2 * PIECE_CHARACTERS or (characters >= PIECE_CHARACTERS and not line.strip())
            if full:
                yield start, "".join(piece)
                piece, start, characters = [], number, 0
            piece.append(part)
            characters += len(part)
    yield start, "".join(piece)


def read_json_lines(path: Path, example: str) -> Iterator[tuple[int, dict[str, object]]]:
    """The objects of a plain or compressed .jsonl file with their line numbers; blank lines are passed over.

    Raises:
        UsageError: the file cannot be opened.
        IntegrityError: a line is no JSON object (the hint then shows `example`), or the file is damaged.
    """
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = _parse_json(line, where)
        if not isinstance(row, dict):
            raise IntegrityError(f"{where} is not a JSON object", f"each line must be like {example}")
        yield number, row


def _json_line_texts(path: Path, text_field: str | None) -> Iterator[tuple[int, str]]:
    field: str | None = None
    for number, row in read_json_lines(path, '{"text": "..."}'):
        where = f"{path}, line {number}"
        field = field or choose_text_field(row, text_field, where)
        yield number, text_of(row, field, where)


def _json_array_texts(path: Path, text_field: str | None) -> Iterator[tuple[int, str]]:
    field: str | None = None
    rows = _parse_json("".join(line for _, line in _lines(path)), str(path))
    for number, row in enumerate(cast(list[object], rows), start=1):
        where = f"{path}, item {number}"
        if not isinstance(row, dict):
            raise IntegrityError(f"{where} is not a JSON object", 'each item must be like {"text": "..."}')
        field = field or choose_text_field(row, text_field, where)
        yield number, text_of(row, field, where)


def _parquet_texts(path: Path, text_field: str | None) -> Iterator[tuple[int, str]]:
    if path.suffix.lower() in COMPRESSIONS:
        raise UsageError(f"{path}: a parquet file is compressed inside and cannot be read through {path.suffix}")
    number = 0
    try:
        with _open(path) as raw, pq.ParquetFile(raw) as parquet:
            field = choose_text_field(_string_columns(parquet.schema_arrow), text_field, str(path))
            for batch in parquet.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=[field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield number, text_of({field: value}, field, f"{path}, row {number}")
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError(
            f"{path} is not a whole parquet file (after row {number}): {_first_line(error)}", "fetch it again"
        ) from error


def _string_columns(schema: pa.Schema) -> Mapping[str, object]:
    """A stand-in for the first row: an empty string for each column of strings."""
    strings = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return {column.name: "" if any(test(column.type) for test in strings) else None for column in schema}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a plain or compressed file with their numbers, line ends as '\\n'."""
    number = 0
    try:
        with _open(path) as raw, _decompressed(raw, path.suffix.lower()) as stream:
            for number, line in enumerate(stream, start=1):
                yield number, _decode(line, path, number)
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise IntegrityError(
            f"{path} is corrupt or truncated after line {number}: {_first_line(error)}", "fetch or compress it again"
        ) from error


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def _decompressed(raw: IO[bytes], suffix: str) -> IO[bytes]:
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(raw))
    if suffix == ".bz2":
        return cast(IO[bytes], bz2.open(raw))
    if suffix == ".xz":
        return cast(IO[bytes], lzma.open(raw))
    if suffix == ".zst":
        return io.BufferedReader(cast(io.RawIOBase, pa.CompressedInputStream(raw, "zstd")))
    return raw


def _decode(line: bytes, path: Path, number: int) -> str:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise IntegrityError(
            f"{path}, line {number} is not UTF-8: byte {error.start + 1} of the line is {line[error.start]:#04x}",
            "convert the file to UTF-8",
        ) from error
    return text[:-2] + "\n" if text.endswith("\r\n") else text


def _parse_json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{where} is not valid JSON: {_first_line(error)}") from error


def _starts_with_bracket(path: Path) -> bool:
    first = next((line.lstrip() for _, line in _lines(path) if line.strip()), "")
    return first.startswith("[")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
