"""Local text files: every format and compression, streamed, and faults that name file and line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from factorctl.data.account import SourceAccount
from factorctl.data.documents import Document
from factorctl.data.local_files import PIECE_CHARACTERS, read_file
from factorctl.data.mixing import iter_documents
from factorctl.data.seeded_order import seeded_order
from factorctl.data.spec import parse_data_spec
from factorctl.errors import FactorctlError, IntegrityError, UsageError
from factorctl.progress import SilentProgress

TEXTS = ["The quick brown fox.", "Größe, 東京, \U0001f98a and\u2028one line.", "Third\ndocument."]


def _zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": _zstd,
}


def _json_lines(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: t}, ensure_ascii=False) + "\n" for i, t in enumerate(texts)).encode()


def _read(path: Path, text_field: str | None = None) -> list[Document]:
    return list(read_file(path, path.name, SourceAccount("src", SilentProgress()), text_field))


def _fault(path: Path, text_field: str | None = None) -> FactorctlError:
    with pytest.raises(FactorctlError) as caught:
        _read(path, text_field)
    return caught.value


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](_json_lines(TEXTS)))
    documents = _read(path)
    assert [document.text for document in documents] == TEXTS
    assert [document.id for document in documents] == [f"a.jsonl{suffix}:{n}" for n in (1, 2, 3)]
    assert {document.source for document in documents} == {"src"}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_plain_text(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix]("\ufeffOne line\r\nand another.\n\nA paragraph.".encode()))
    assert [document.text for document in _read(path)] == ["One line\nand another.\n\nA paragraph."]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_array(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.json{suffix}"
    path.write_bytes(COMPRESS[suffix](json.dumps([{"text": text} for text in TEXTS], indent=1).encode()))
    assert [document.text for document in _read(path)] == TEXTS


def test_json_file_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(_json_lines(TEXTS))
    assert [document.text for document in _read(path)] == TEXTS


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet(tmp_path: Path, kind: Any) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"{text} {i}" for i in range(200) for text in TEXTS]
    table = pa.table({"n": list(range(len(texts))), "body": pa.array(texts, kind)})
    pq.write_table(table, path, row_group_size=100)
    documents = _read(path)
    assert [document.text for document in documents] == texts
    assert documents[-1].id == "a.parquet:600"


def test_several_compressed_frames(tmp_path: Path) -> None:
    for suffix, compress in COMPRESS.items():
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(compress(_json_lines(TEXTS[:2])) + compress(_json_lines(TEXTS[2:])))
        assert [document.text for document in _read(path)] == TEXTS, suffix


def test_long_text_is_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraph = "word " * 200 + "\n\n"
    path = tmp_path / "book.txt"
    path.write_text(paragraph * 100)
    documents = _read(path)
    assert "".join(document.text for document in documents) == paragraph * 100
    assert len(documents) == 4
    assert all(len(document.text) < PIECE_CHARACTERS + 2 * len(paragraph) for document in documents)
    assert [int(document.id.split(":")[1]) % 2 for document in documents] == [1, 0, 0, 0]


def test_text_without_breaks_is_cut_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    path.write_text("x" * (5 * PIECE_CHARACTERS))
    documents = _read(path)
    assert "".join(document.text for document in documents) == "x" * (5 * PIECE_CHARACTERS)
    assert max(len(document.text) for document in documents) <= 2 * PIECE_CHARACTERS


def test_blank_documents_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" + _json_lines(["", "  \n", "text"]) + b"\n\n")
    assert [document.id for document in _read(path)] == ["a.jsonl:4"]
    (tmp_path / "a.txt").write_text(" \n\n")
    assert _read(tmp_path / "a.txt") == []


def test_text_field(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"title": "T", "text": "X", "n": 1}\n')
    assert _read(path)[0].text == "X"
    assert _read(path, "title")[0].text == "T"
    path.write_text('{"n": 1, "content": "C"}\n')
    assert _read(path)[0].text == "C"


@pytest.mark.parametrize(
    ("content", "field", "message", "hint"),
    [
        ('{"title": "a", "body": "b"}\n', None, "line 1 has no field 'text', and not just one other field that could "
         "hold the text (found: body, title)", "name the field with --text-field: body, title"),
        ('{"id": "a", "tags": ["b"]}\n', None, "(found: id; tags, a list of strings)", "with --text-field: id"),
        ('{"id": "a", "doc": {"body": "b"}}\n', None, "(found: id; doc, an object)", "--text-field: doc.body, id"),
        ('{"n": 1}\n', None, "could hold the text (found: none)", 'give rows with a string as their text'),
        ('{"text": 7, "url": "b"}\n', None, "line 1: field 'text' holds numbers or other values, not text", "url"),
        ('{"text": ["a", "b"], "url": "c"}\n', None, "line 1: field 'text' holds a list of strings, not text",
         "join each list into one string"),
        ('{"doc": {"body": "b"}}\n', "doc.text", "line 1 has no field 'doc.text'", "known: doc, doc.body"),
        ('{"text": "a"}\n', "txet", "line 1 has no field 'txet'", "did you mean 'text'?"),
        ('{"text": "a"}\n{"txt": "b"}\n', None, "line 2 has no field 'text'", "did you mean 'txt'?"),
        ('{"text": "a"}\n{"text": ["b"]}\n', None, "line 2: field 'text' holds a list of strings, not text", "another"),
        ('{"url": "a"}\n' * 70 + '{"url": "a", "text": "b"}\n', None, "line 71 has a field 'text', which no row before "
         "it has: there 'url' was read", "name the field with --text-field"),
    ],
)  # fmt: skip
def test_missing_field(tmp_path: Path, content: str, field: str | None, message: str, hint: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    error = _fault(path, field)
    assert isinstance(error, UsageError)
    assert error.message.endswith(message)
    assert str(path) in error.message
    assert error.hint is not None
    assert hint in error.hint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', "a.jsonl, line 2 is not valid JSON: "),
        ("a.jsonl", b'{"text": "a"}\n"b"\n', "a.jsonl, line 2 is not a JSON object"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl, line 1: field 'text' is not valid Unicode (a lone surrogate)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl, line 2 is not UTF-8: byte 11 of the line is 0xff"),
        ("a.jsonl", b'{"text": ' + b"[" * 200_000, "a.jsonl, line 1 is not valid JSON: "),
        ("a.txt", b"fine\nalso fine\ncaf\xe9\n", "a.txt, line 3 is not UTF-8: byte 4 of the line is 0xe9"),
        ("a.json", b'[{"text": "a"}, {"text"', "a.json is not valid JSON: "),
        ("a.json", b'[{"text": "a"}, 3]', "a.json, item 2 is not a JSON object"),
        ("a.parquet", b"PAR1 not really", "a.parquet is not a whole parquet file (after row 0): "),
        ("a.parquet", b"", "a.parquet is not a whole parquet file (after row 0): "),
    ],
)
def test_corrupt_content(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    error = _fault(tmp_path / name)
    assert isinstance(error, IntegrityError)
    assert error.message.startswith(f"{tmp_path}{os.sep}{message}")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_corrupt_compression(tmp_path: Path, suffix: str, damage: str) -> None:
    lines = _json_lines([os.urandom(40).hex() for _ in range(5000)])
    whole = COMPRESS[suffix](lines)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"this was never compressed")
    error = _fault(path)
    assert isinstance(error, IntegrityError)
    assert f"a.jsonl{suffix} is corrupt or truncated after line " in error.message
    assert error.hint == "fetch or compress it again"


def test_compressed_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    assert (
        "a parquet file is compressed inside and cannot be read through .gz"
        in _fault(tmp_path / "a.parquet.gz").message
    )


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files_are_known_by_their_first_bytes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(COMPRESS[suffix](_json_lines(TEXTS)))
    assert [document.text for document in _read(path)] == TEXTS


def test_parquet_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    pq.write_table(pa.table({"text": TEXTS}), path)
    assert [document.text for document in _read(path)] == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_files_that_git_lfs_did_not_fetch(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    error = _fault(tmp_path / name)
    assert isinstance(error, IntegrityError)
    assert error.message == f"{tmp_path / name} is a git-lfs pointer, not the file that it points to"
    assert error.hint == f"fetch the file itself: git lfs pull --include {name}"


def test_one_json_object_is_no_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"text": "a"}]}, indent=1))
    error = _fault(tmp_path / "a.json")
    assert error.message == f"{tmp_path / 'a.json'} is neither an array of objects nor an object a line"
    assert error.hint == "write its rows as one array, or one a line"


def test_vanished_file(tmp_path: Path) -> None:
    error = _fault(tmp_path / "gone.txt")
    assert isinstance(error, UsageError)
    assert error.message.endswith("gone.txt cannot be read: No such file or directory")


def test_files_are_streamed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(_json_lines(["good"] * 3) + b"bad\n")
    assert len(list(islice(read_file(path, "a", SourceAccount("src", SilentProgress()), None), 3))) == 3


def _folder(tmp_path: Path, name: str, files: int, texts: list[str]) -> str:
    folder = tmp_path / name
    folder.mkdir()
    for i in range(files):
        (folder / f"{i}.jsonl").write_bytes(_json_lines([f"{name}{i}-{text}" for text in texts]))
    return str(folder)


def test_file_order_is_seeded_and_documents_keep_theirs(tmp_path: Path) -> None:
    spec = parse_data_spec(_folder(tmp_path, "a", 8, ["x", "y"]))
    orders = {seed: [document.text for document in iter_documents(spec, seed=seed)] for seed in (0, 1)}
    assert orders[0] == [document.text for document in iter_documents(spec, seed=0)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    assert all(
        a[:-1] == b[:-1] and (a[-1], b[-1]) == ("x", "y") for a, b in zip(orders[0][::2], orders[0][1::2], strict=True)
    )


def test_file_order_is_fixed_for_good() -> None:
    """Whoever names the same files and seed gets the same text, wherever the folder lies."""
    names = [f"{i}.txt" for i in range(6)]
    assert (
        seeded_order(names, 0)
        == seeded_order(reversed(names), 0)
        == ["4.txt", "0.txt", "3.txt", "1.txt", "5.txt", "2.txt"]
    )
    assert seeded_order(names, 1) != seeded_order(names, 0)


def test_mixing_by_text(tmp_path: Path) -> None:
    """Documents of A are four times as long: the shares hold in characters, at every moment."""
    a, b = _folder(tmp_path, "a", 1, ["x" * 397] * 200), _folder(tmp_path, "b", 1, ["y" * 97] * 2000)
    spec = parse_data_spec(f"{a}=0.75,{b}=0.25")
    characters = {a: 0, b: 0}
    for count, document in enumerate(islice(iter_documents(spec, seed=0), 250), start=1):
        characters[document.source] += len(document.text)
        if count > 50:
            assert characters[a] / sum(characters.values()) == pytest.approx(0.75, abs=0.02)


def test_a_source_that_ends_is_noted(tmp_path: Path) -> None:
    a, b = _folder(tmp_path, "a", 1, ["x"] * 2), _folder(tmp_path, "b", 1, ["y"] * 6)
    progress = SilentProgress()
    texts = [document.text[0] for document in iter_documents(parse_data_spec(f"{a},{b}"), seed=0, progress=progress)]
    assert texts == ["a", "b", "a", "b", "b", "b", "b", "b"]
    assert progress.notes == [
        f"'{a}': read as text: field 'text'",
        f"'{b}': read as text: field 'text'",
        f"'{a}' has no more text: the other sources go on without it",
    ]


def test_self_without_model() -> None:
    with pytest.raises(UsageError, match="`self` needs the dense model to sample from"):
        list(iter_documents(parse_data_spec("self"), seed=0))


def test_real_text() -> None:
    found = os.environ.get("FACTORCTL_TEST_DATA")
    folder = Path(found) if found else Path(__file__).parents[4] / "shared" / "data"
    path = folder / "lm" / "valid.jsonl.xz"
    if not path.exists():
        pytest.skip("no real text: set FACTORCTL_TEST_DATA")
    documents = _read(path)
    assert len(documents) == 344
    assert sum(len(document.text) for document in documents) > 2_500_000
