"""The dense source that a manifest names is found again: a GGUF file by its own path, with or without the cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import DenseSource
from support.gguf_files import write_model
from support.tiny import make_model

from factorctl.checkpoint.sources import Source
from factorctl.errors import UsageError
from factorctl.files.cache import cache_directory
from factorctl.pipeline.common.dense_source import find_source
from factorctl.pipeline.common.recorded_source import describe_source, find_recorded_source, has_recorded_weights
from factorctl.progress import SilentProgress


@pytest.fixture
def gguf_file(dense_source: DenseSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("factorctl.pipeline.common.dense_source.has_llama_cpp", lambda: False)
    return write_model(tmp_path / "tiny.gguf", make_model(), dense_source())


def found(known: dict[str, object]) -> Source:
    return find_recorded_source(known, SilentProgress(), wanted_for="the teacher", hint="name it")


def test_a_gguf_file_is_found_by_its_own_path(gguf_file: Path) -> None:
    known = describe_source(find_source(str(gguf_file), SilentProgress()))
    assert known["path"] == str(gguf_file)
    shutil.rmtree(cache_directory() / "gguf")
    assert has_recorded_weights(found(known).path, known["files"])


def test_a_gguf_file_that_is_gone_leaves_its_copy(gguf_file: Path) -> None:
    known = describe_source(find_source(str(gguf_file), SilentProgress()))
    gguf_file.unlink()
    copy = found(known)
    assert has_recorded_weights(copy.path, known["files"])
    assert copy.notes == (f"{gguf_file} is not there any more; the cached copy is used",)
    shutil.rmtree(cache_directory() / "gguf")
    with pytest.raises(UsageError, match=rf"the teacher; it was not found: {gguf_file} is not there any more"):
        found(known)


def test_another_gguf_file_of_that_name_is_not_taken(gguf_file: Path, dense_source: DenseSource) -> None:
    known = describe_source(find_source(str(gguf_file), SilentProgress()))
    write_model(gguf_file, make_model(seed=1), dense_source())
    copy = found(known)
    assert has_recorded_weights(copy.path, known["files"])
    assert "is another file by now" in copy.notes[0]
    shutil.rmtree(cache_directory() / "gguf")
    with pytest.raises(UsageError, match="is another file by now"):
        found(known)
