"""Flipped, zeroed, truncated, extended and missing bytes in every file of every artefact: found, named, not read."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bench import Bench
from comparing import LOCK_NAME
from faults.tally import Tally
from standins import without_engines
from support.command_line import cli
from support.tiny import directory_bytes
from verbs import HERE, ROWS

import factorctl
from factorctl.checkpoint.manifest import MANIFEST_NAME
from factorctl.errors import ExitCode, FactorctlError, IntegrityError
from factorctl.files.hashing import hash_bytes

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


ARTEFACTS = ["base", "finetune", *(name for name in ROWS if name.startswith("export"))]


def artefact(bench: Bench, name: str) -> Path:
    return bench.base if name == "base" else bench.made(name)


@pytest.mark.parametrize("name", ARTEFACTS)
def test_verify_finds_it(name: str, bench: Bench, tmp_path: Path, tally: Tally) -> None:
    if name != "base" and name not in HERE:
        pytest.skip(f"{ROWS[name].needs} is not installed")
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
                if damage.startswith("bit flipped") and damaged is not None and file != MANIFEST_NAME:
                    assert all(hash_bytes(each).sha256 in outcome.message for each in (content, damaged))
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
                ["eval", copy, "--data", bench.text, "--data-tokens", 100],
                ["profile", copy, "--no-latency", "--data", "random"],
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


def test_a_damaged_evaluation_is_mended_by_the_same_command(bench: Bench, tmp_path: Path, tally: Tally) -> None:
    """Parts, answers, picture, report and results: what is not what was written is computed or written again."""
    place = bench.place("eval", tmp_path / "place")
    assert place.run().code == ExitCode.DONE
    for index, (file, content) in enumerate(directory_bytes(place.out).items()):
        ways = [way for way in damages(content, file) if way[1] != content]
        damage, damaged = ways[index % len(ways)]
        with tally.case("damaged bytes, mended by the next run", f"eval, {Path(file).suffix.lstrip('.')}"):
            _put(place.out / file, damaged)
            fate = place.run()
            assert fate.code == ExitCode.DONE, f"{file} {damage}: {fate.message}"
            assert place.result() == place.wanted, f"{file} {damage}"


MENDED = (
    "factorized/model-00002-of-00003.safetensors",
    "finetuned/factorctl.json",
    "eval/results.json",
    "profile/profile.json",
    "export-hf/config.json",
)


def test_a_damaged_run_is_mended_by_the_same_command(bench: Bench, tmp_path: Path, tally: Tally) -> None:
    """A stage whose result is no longer what it gave is not reused, whatever stands behind it."""
    place = bench.place("run", tmp_path / "place")
    assert place.run().code == ExitCode.DONE
    for file in MENDED:
        content = (place.out / file).read_bytes()
        with tally.case("damaged bytes, mended by the next run", "run"):
            _put(place.out / file, flipped(content, len(content) // 2, 0))
            fate = place.run()
            assert fate.code == ExitCode.DONE, f"{file}: {fate.message}"
            assert place.result() == place.wanted, file


def test_a_damaged_lock_of_a_recipe_is_named(bench: Bench, tmp_path: Path, tally: Tally) -> None:
    place = bench.place("run", tmp_path / "place")
    content = (bench.made("run") / LOCK_NAME).read_bytes()
    place.out.mkdir()
    for damage, damaged in damages(content, "lock"):
        if damaged is None or damaged == content[:-1]:
            continue  # every stage runs, or the newline at the end is gone
        with tally.case("damaged bytes, refused by every verb", LOCK_NAME):
            _put(place.out / LOCK_NAME, damaged)
            outcome = cli(*place.arguments)
            assert outcome.code == ExitCode.INTEGRITY, f"{damage}: {outcome}"
            assert LOCK_NAME in outcome.message
            assert "delete it: every stage runs again then" in outcome.message


def test_damaged_blocks_of_text_are_built_again(bench: Bench, tmp_path: Path, tally: Tally) -> None:
    place = bench.place("finetune", tmp_path / "place")
    assert place.run().code == ExitCode.DONE
    cached = {path: path.read_bytes() for path in (place.root / "cache").rglob("*") if path.is_file()}
    for path, content in cached.items():
        with tally.case("damaged bytes, mended by the next run", "blocks of text"):
            if content:
                _put(path, flipped(content, len(content) // 2, 0))
            fate = place.run(None, "--overwrite")
            assert fate.code == ExitCode.DONE, f"{path.name}: {fate.message}"
            assert place.result() == place.wanted, path.name
