"""Flipped, zeroed, truncated, extended and missing bytes in every file of every artefact: found, named, not read."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.tally import Tally
from helpers import directory_bytes
from helpers_cli import cli
from verbs import Bench, without_engines

import factorctl
from factorctl.checkpoint.manifest import MANIFEST_NAME
from factorctl.errors import ExitCode, FactorctlError, IntegrityError

Damage = Callable[[bytes], bytes | None]
"""From the right content to a damaged one; None where the file is gone."""


def flipped(content: bytes, at: int, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[at] ^= 1 << bit
    return bytes(damaged)


def zeroed(content: bytes, at: int) -> bytes:
    return content[:at] + bytes(min(16, len(content) - at)) + content[at + 16 :]


def damages(content: bytes, seed: str) -> Iterator[tuple[str, bytes | None]]:
    """Name and damaged content; None for a file that is gone."""
    draw = random.Random(seed)
    last = len(content) - 1
    for at in sorted({0, last // 2, last, *(draw.randrange(len(content)) for _ in range(3))}):
        yield f"bit flipped at {at}", flipped(content, at, draw.randrange(8))
    for at in (0, last // 2, max(0, last - 15)):
        yield f"zeroed at {at}", zeroed(content, at)
    for size in (0, last // 2, last):
        yield f"truncated to {size}", content[:size]
    yield "a byte too long", content + b"\0"
    yield "twice", content + content
    yield "gone", None


ARTEFACTS = ["base", "finetune", "export hf", "export gguf", "export dense"]


def artefact(bench: Bench, name: str) -> Path:
    return bench.base if name == "base" else bench.made(name)


@pytest.mark.parametrize("name", ARTEFACTS)
def test_verify_finds_it(name: str, bench: Bench, tmp_path: Path, tally: Tally) -> None:
    copy = Path(shutil.copytree(artefact(bench, name), tmp_path / "copy"))
    whole = directory_bytes(copy)
    assert cli("verify", copy, "-q").code == ExitCode.DONE
    for file, content in whole.items():
        for damage, damaged in damages(content, f"{name} {file}"):
            if damaged == content or (file == MANIFEST_NAME and damaged == content[:-1]):
                continue  # zeros were zeroed, or the newline behind the manifest is gone
            with tally.case("damaged bytes, found by verify", _kind(file)):
                _put(copy / file, damaged)
                outcome = cli("verify", copy, "-q")
                gone = file == MANIFEST_NAME and damaged is None
                assert outcome.code == (ExitCode.USAGE if gone else ExitCode.INTEGRITY), f"{file} {damage}: {outcome}"
                assert file in outcome.message, f"{file} {damage}"
                assert "Traceback" not in outcome.stderr
            _put(copy / file, content)
    assert cli("verify", copy, "-q").code == ExitCode.DONE


def _put(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


def _kind(file: str) -> str:
    return "shards" if file.startswith("model-") else file


@pytest.mark.parametrize("replaced", ["a directory", "a link out of it", "a dangling link"])
def test_verify_refuses_what_is_no_file(replaced: str, bench: Bench, tmp_path: Path, tally: Tally) -> None:
    copy = Path(shutil.copytree(bench.base, tmp_path / "copy"))
    for path in sorted(copy.iterdir()):
        content = path.read_bytes()
        path.unlink()
        if replaced == "a directory":
            path.mkdir()
        else:
            outside = tmp_path / "outside"
            outside.write_bytes(content)
            path.symlink_to(outside if replaced == "a link out of it" else tmp_path / "nowhere")
        with tally.case("damaged bytes, found by verify", f"file replaced by {replaced}"):
            outcome = cli("verify", copy, "-q")
            assert outcome.code in (ExitCode.INTEGRITY, ExitCode.USAGE)
            assert path.name in outcome.message
        path.rmdir() if replaced == "a directory" else path.unlink()
        path.write_bytes(content)


def test_no_verb_reads_a_damaged_checkpoint(bench: Bench, tmp_path: Path, tally: Tally) -> None:
    copy = Path(shutil.copytree(bench.base, tmp_path / "copy"))
    for file, content in directory_bytes(copy).items():
        _put(copy / file, flipped(content, len(content) // 2, 0))
        with tally.case("damaged bytes, refused by every verb", _kind(file)), without_engines():
            with pytest.raises(IntegrityError):
                factorctl.load(copy)
            for command in (
                ["export", copy, "--to", "hf"],
                ["export", copy, "--to", "gguf"],
                ["finetune", copy, "--tokens", 64, "--data", bench.text, "--block-length", 32],
            ):
                outcome = cli(*command, "--out", tmp_path / "out")
                assert outcome.code == ExitCode.INTEGRITY, f"{command[0]}, {file}: {outcome.message}"
                assert file in outcome.message
                assert not (tmp_path / "out").exists()
        _put(copy / file, content)


def test_an_extra_shard_is_refused(bench: Bench, tmp_path: Path, tally: Tally) -> None:
    for name in ("base", "export hf", "export dense"):
        copy = Path(shutil.copytree(artefact(bench, name), tmp_path / name))
        shard = next(path for path in copy.glob("*.safetensors"))
        for extra in ("model.safetensors", "model-00001-of-00099.safetensors", "adapter_model.safetensors"):
            with tally.case("damaged bytes, found by verify", "an extra shard"):
                shutil.copy(shard, copy / extra)
                outcome = cli("verify", copy, "-q")
                assert outcome.code == ExitCode.INTEGRITY
                assert extra in outcome.message
            (copy / extra).unlink()


def test_the_parts_of_two_checkpoints_do_not_mix(bench: Bench, tmp_path: Path, tally: Tally) -> None:
    """Each file is whole, but one of them is another checkpoint's."""
    copy = Path(shutil.copytree(bench.base, tmp_path / "copy"))
    others = directory_bytes(bench.made("finetune"))
    for file, content in directory_bytes(copy).items():
        if others[file] != content:
            with tally.case("damaged bytes, found by verify", "a file of another checkpoint"):
                _put(copy / file, others[file])
                with pytest.raises(FactorctlError):
                    factorctl.load(copy)
            _put(copy / file, content)
