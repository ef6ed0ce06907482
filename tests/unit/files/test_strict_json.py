"""JSON and file names from strangers: read exactly, or refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from factorctl.errors import IntegrityError
from factorctl.files.names import plain_name, regular_file
from factorctl.files.strict_json import (
    MAX_DEPTH,
    dump_json,
    dump_sealed,
    parse_json_object,
    read_json_object,
    read_sealed,
    seal_of,
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[1]", "holds a list, not a JSON object"),
        ('"x"', "holds a str"),
        ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
        ('{"b": {"a": 1, "a": 1}}', "stands twice"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": -Infinity}', "-Infinity is not a JSON number"),
        ('{"a": 1e999}', "1e999 is beyond the range of a number"),
        ('{"a": "\\ud800"}', "half a surrogate pair"),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", f"nested more than {MAX_DEPTH} levels"),
        ('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}", "nested"),
    ],
)
def test_what_is_refused(text: str, words: str) -> None:
    with pytest.raises(IntegrityError, match=words):
        parse_json_object(text, origin="x.json")


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(IntegrityError, match="is missing"):
        read_json_object(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(IntegrityError, match="cannot be read"):
        read_json_object(tmp_path / "latin.json")
    with pytest.raises(IntegrityError, match="cannot be read"):
        read_json_object(tmp_path)
    monkeypatch.setattr("factorctl.files.strict_json.MAX_BYTES", 4)
    with pytest.raises(IntegrityError, match="larger than"):
        read_json_object(tmp_path / "latin.json")


def test_a_seal_shows_every_change_of_meaning(tmp_path: Path) -> None:
    path = tmp_path / "sealed.json"
    content = {"a": [0.1, {"b": "é\U0001f999"}], "c": None}
    path.write_bytes(dump_sealed(content))
    assert read_sealed(path) == content
    assert json.loads(path.read_bytes()) == {**content, "sha256": seal_of(content)}
    for change in ({"a": 1}, {"c": 0}, {"sha256": "0" * 64}, {"sha256": None}, {"d": 1}):
        path.write_text(json.dumps({**content, "sha256": seal_of(content), **change}))
        with pytest.raises(IntegrityError, match=r"sealed\.json is damaged: its content has sha256"):
            read_sealed(path)


def test_the_same_value_gives_the_same_bytes() -> None:
    assert dump_json({"b": 1, "a": "é"}) == '{\n  "a": "é",\n  "b": 1\n}\n'.encode()
    assert dump_json({"b": 1, "a": 2}) == dump_json({"a": 2, "b": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        dump_json({"a": float("nan")})
    value = {"a": [0.1, 1e-30, 2**53], "b": None}
    assert json.loads(dump_json(value)) == value


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "LICENSE", "a b+c_1.json"])
def test_plain_names(name: str) -> None:
    assert plain_name(name, origin="x") == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", ".hidden", "x\n", "x\0", "a" * 300, "ü", 3, None],
)
def test_names_that_are_refused(name: object) -> None:
    with pytest.raises(IntegrityError, match="only plain names"):
        plain_name(name, origin="the index")


def test_regular_files_only(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside.txt"
    inside.mkdir()
    outside.write_text("x")
    (inside / "real").write_text("x")
    (inside / "near").symlink_to(inside / "real")
    (inside / "far").symlink_to(outside)
    (inside / "folder").mkdir()
    assert regular_file(inside, "real", origin="m") == inside / "real"
    assert regular_file(inside, "near", origin="m") == inside / "near"
    for name, words in (("far", "leads out"), ("folder", "missing"), ("none", "missing")):
        with pytest.raises(IntegrityError, match=words):
            regular_file(inside, name, origin="m")
