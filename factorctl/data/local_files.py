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

from factorctl.data.account import SourceAccount
from factorctl.data.documents import DOMAIN_FIELDS, Document
from factorctl.data.shapes import shapes_of_schema
from factorctl.data.spec import COMPRESSIONS, format_suffix
from factorctl.data.text_field import choose_text_field, read_row, read_rows
from factorctl.errors import IntegrityError, UsageError
from factorctl.files.first_bytes import first_bytes, refuse_pointer

PIECE_CHARACTERS = 32_768
"""A .txt document ends at the first blank line after this many characters, at any line after twice as many."""
_PARQUET_BATCH_ROWS = 256
_PARQUET_MAGIC = b"PAR1"
_COMPRESSION_MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}


def read_file(path: Path, name: str, account: SourceAccount, text_field: str | None) -> Iterator[Document]:
    """The documents of one file in their order; `id` is 'name:line' (item or row for .json and .parquet).

    Raises:
        UsageError: the file cannot be opened, or a row lacks the text field.
        IntegrityError: corrupt or truncated compression, bad UTF-8, JSON or parquet.
    """
    suffix = ".parquet" if _first_bytes(path).startswith(_PARQUET_MAGIC) else format_suffix(path.name)
    if suffix == ".txt":
        if account.rows is not None:
            raise UsageError(
                f"{path} is plain text without fields: '{account.rows}' chooses rows by one", "name the file alone"
            )
        pieces = ((f"{name}:{number}", text) for number, text in _text_pieces(path) if text.strip())
        return (Document(text=text, source=account.source, id=identity) for identity, text in pieces)
    if suffix == ".parquet":
        return _parquet_documents(path, name, account, text_field)
    numbered = _json_items(path) if suffix == ".json" and _is_array(path) else _json_rows(path)
    rows = ((f"{name}:{number}", where, row) for number, where, row in numbered)
    return read_rows(rows, text_field, account)


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


def _json_rows(path: Path) -> Iterator[tuple[int, str, Mapping[str, object]]]:
    for number, row in read_json_lines(path, '{"text": "..."}'):
        yield number, f"{path}, line {number}", row


def _json_items(path: Path) -> Iterator[tuple[int, str, Mapping[str, object]]]:
    rows = _parse_json("".join(line for _, line in _lines(path)), str(path))
    for number, row in enumerate(cast(list[object], rows), start=1):
        where = f"{path}, item {number}"
        if not isinstance(row, dict):
            raise IntegrityError(f"{where} is not a JSON object", 'each item must be like {"text": "..."}')
        yield number, where, row


def _parquet_documents(path: Path, name: str, account: SourceAccount, text_field: str | None) -> Iterator[Document]:
    if path.suffix.lower() in COMPRESSIONS:
        raise UsageError(
            f"{path}: a parquet file is compressed inside and cannot be read through {path.suffix}",
            f"decompress it, then name {path.stem}",
        )
    number = 0
    try:
        with _open(path) as raw, pq.ParquetFile(raw) as parquet:
            field = choose_text_field(shapes_of_schema(parquet.schema_arrow), text_field, str(path))
            columns = _columns_read(parquet.schema_arrow.names, field.path[0], account)
            for batch in parquet.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    where = f"{path}, row {number}"
                    document = read_row(row, field, f"{name}:{number}", where, account)
                    if document is not None:
                        yield document
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError(
            f"{path} is not a whole parquet file (after row {number}): {_first_line(error)}", "fetch it again"
        ) from error


def _columns_read(names: list[str], text: str, account: SourceAccount) -> list[str]:
    """The text's column, and those that say what sort of row it is."""
    asked = account.rows.field if account.rows is not None else ""
    wanted = {text, *DOMAIN_FIELDS, asked, asked.partition(".")[0]}
    return [name for name in names if name in wanted]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a plain or compressed file with their numbers, line ends as '\\n'."""
    number = 0
    try:
        with _open(path) as raw, _decompressed(raw, _compression(path)) as stream:
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


def _first_bytes(path: Path) -> bytes:
    """What a file is known by, whatever it is called.

    Raises:
        IntegrityError: it is what git left in the place of a large file.
    """
    _open(path).close()  # one that cannot be read is told of as such
    refuse_pointer(path)
    return first_bytes(path)


def _compression(path: Path) -> str:
    """By its name, else by its first bytes; '' for none."""
    if path.suffix.lower() in COMPRESSIONS:
        return path.suffix.lower()
    first = _first_bytes(path)
    return next((suffix for magic, suffix in _COMPRESSION_MAGIC.items() if first.startswith(magic)), "")


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


def _is_array(path: Path) -> bool:
    """Whether a .json file is one array; else each line is an object.

    Raises:
        IntegrityError: it is one object over several lines.
    """
    first = next((line.strip() for _, line in _lines(path) if line.strip()), "")
    if first.startswith("{") and not first.endswith("}"):
        raise IntegrityError(
            f"{path} is neither an array of objects nor an object a line", "write its rows as one array, or one a line"
        )
    return first.startswith("[")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
