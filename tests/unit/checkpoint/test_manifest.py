"""factorctl.json: every field checked on the way in, the same bytes on the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from factorctl.checkpoint.manifest import MANIFEST_NAME, Manifest, check_files, read_manifest, write_manifest
from factorctl.errors import ExitCode, FactorctlError, IntegrityError, UsageError
from factorctl.files.hashing import FileRecord, hash_bytes

HASH = "ab" * 32


def manifest(**changes: Any) -> Manifest:
    plain: dict[str, Any] = {
        "kind": "native", "stage": "factorize", "tool_version": "0.1.0",
        "source": {"id": "x", "kind": "local", "files": {}},
        "factored": {"num_experts": 4, "top_k": 2, "expert_size": 5, "shared_size": 4, "gate": "softmax",
                     "scale": "sum", "notation": "1R4E2K+S4", "active_ffn_fraction": 0.5},
        "files": {"config.json": FileRecord(HASH, 3)},
    }  # fmt: skip
    return Manifest(**{**plain, **changes})


def damaged(tmp_path: Path, **changes: Any) -> Path:
    raw = {**json.loads(manifest().to_bytes()), "sha256": ..., **changes}
    (tmp_path / "factorctl.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    return tmp_path


def test_a_manifest_comes_back_as_it_was(tmp_path: Path) -> None:
    written = manifest(parent=HASH, details={"layers": [{"x": 0.1}]}, libraries={"torch": "2"})
    write_manifest(tmp_path, written)
    read = read_manifest(tmp_path)
    assert read == written
    assert read.sha256 == json.loads((tmp_path / "factorctl.json").read_bytes())["sha256"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema_version": ...}, "has no schema_version"),
        ({"schema_version": True}, "has no schema_version"),
        ({"schema_version": "1"}, "has no schema_version"),
        ({"kind": ...}, "field 'kind' is missing or of the wrong type"),
        ({"stage": 3}, "field 'stage'"),
        ({"source": []}, "field 'source'"),
        ({"files": []}, "field 'files'"),
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"parent": "abc"}, "field 'parent' is no sha256"),
        ({"files": {"../x": {"sha256": HASH, "size": 1}}}, "only plain names"),
        ({"files": {"x": {"sha256": HASH}}}, "needs a sha256 and a size"),
        ({"files": {"x": {"sha256": "zz", "size": 1}}}, "needs a sha256 and a size"),
        ({"files": {"x": {"sha256": HASH, "size": -1}}}, "needs a sha256 and a size"),
        ({"files": {"x": {"sha256": HASH, "size": True}}}, "needs a sha256 and a size"),
        ({"files": {"x": HASH}}, "needs a sha256 and a size"),
        ({"sha256": HASH}, f"is damaged: its content has sha256 .*, it says {HASH}"),
        ({"source": {"id": "x"}}, "field 'source.kind' is missing or of the wrong type"),
        ({"source": {"id": "x", "kind": "hub", "files": {"../x": {}}}}, "names '../x', which is no plain file name"),
        ({"source": {"id": "x", "kind": "hub", "files": {}, "path": 3}}, "field 'source.path'"),
        ({"factored": {"num_experts": True}}, "field 'factored.num_experts'"),
        ({"factored": {"num_experts": 10**400}}, "field 'factored.num_experts' is out of range"),
        ({"details": {"layers": [{}, 3]}}, "field 'details.layers' has a damaged record 1"),
        ({"details": {"calibration": {"tokens": 3}}}, "field 'details.calibration.fingerprint'"),
        ({"libraries": {"torch": 2}}, "field 'libraries.torch'"),
    ],
    ids=str,
)
def test_damaged_fields(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=words):
        read_manifest(damaged(tmp_path, **changes))


def test_a_newer_schema_says_to_upgrade(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has schema 99, written by factorctl 7\.0") as caught:
        read_manifest(damaged(tmp_path, schema_version=99, tool_version="7.0", brand_new_field=1))
    assert "upgrade factorctl" in str(caught.value)
    assert caught.value.exit_code == ExitCode.USAGE


def test_a_directory_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no factorctl\.json") as caught:
        read_manifest(tmp_path)
    assert "running the same command again" in str(caught.value)


def test_a_slip_in_a_checkpoint_s_name_is_answered_with_the_one_that_is_there(tmp_path: Path) -> None:
    made = tmp_path / "demo-1R4E2K"
    made.mkdir()
    (made / MANIFEST_NAME).write_text("{}")
    with pytest.raises(UsageError) as mistyped:
        read_manifest(tmp_path / "demo-1R4E2k")
    assert mistyped.value.hint == f"did you mean {made}?"
    with pytest.raises(UsageError) as workspace:
        read_manifest(tmp_path)
    assert workspace.value.hint == f"name one of those in it: {made}"
    with pytest.raises(UsageError) as other:
        read_manifest(tmp_path / "something-else")
    assert other.value.hint == "make a checkpoint with `factorctl factorize`"


def test_files_are_held_to_their_records(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"abc")
    good = manifest(files={"config.json": hash_bytes(b"abc")})
    assert list(check_files(tmp_path, good)) == ["config.json"]
    for record, words in (
        (FileRecord(hash_bytes(b"abc").sha256, 4), "has 3 bytes; its manifest says 4"),
        (FileRecord(HASH, 3), f"its manifest says {HASH}"),
    ):
        with pytest.raises(FactorctlError, match=words):
            list(check_files(tmp_path, manifest(files={"config.json": record})))
    assert list(check_files(tmp_path, manifest(), hashes=False)) == ["config.json"]
    (tmp_path / "stray.safetensors").write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"stray\.safetensors is not in the manifest"):
        list(check_files(tmp_path, good))
