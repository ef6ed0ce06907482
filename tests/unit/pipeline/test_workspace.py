"""Which checkpoint is meant when none is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from factorctl.errors import UsageError
from factorctl.pipeline.common.workspace import newest_checkpoint


def artefact(workspace: Path, name: str, content: str, *, finished: int) -> Path:
    (workspace / name).mkdir()
    manifest = workspace / name / "factorctl.json"
    manifest.write_text(content)
    os.utime(manifest, (finished, finished))
    return manifest.parent


def test_a_kind_is_what_the_manifest_says_of_itself(tmp_path: Path) -> None:
    native = artefact(tmp_path, "native", json.dumps({"kind": "native"}, separators=(",", ":")), finished=1)
    export = {"kind": "export", "made_from": {"kind": "native"}}
    artefact(tmp_path, "export", json.dumps(export, indent=1), finished=2)
    assert newest_checkpoint(tmp_path) == native
    assert newest_checkpoint(tmp_path, kind="export") == tmp_path / "export"


def test_a_damaged_one_is_not_passed_over_for_an_older_one(tmp_path: Path) -> None:
    artefact(tmp_path, "whole", json.dumps({"kind": "native"}), finished=1)
    damaged = artefact(tmp_path, "damaged", '{"kind": "nat', finished=2)
    assert newest_checkpoint(tmp_path) == damaged, "opening it says what is wrong"


def test_hidden_directories_hold_what_is_not_finished(tmp_path: Path) -> None:
    artefact(tmp_path, ".partial", json.dumps({"kind": "native"}), finished=1)
    with pytest.raises(UsageError, match="holds none"):
        newest_checkpoint(tmp_path)
