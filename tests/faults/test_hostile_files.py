"""Ten thousand hostile manifests, configs, indexes, headers and journals: refused in our own words, or harmless."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from bench import Bench
from faults.tally import Tally
from hostile import PATHS, Case, cases
from sandbox import Sandbox, try_cases
from standins import without_engines
from support.command_line import cli
from support.tiny import weights_only
from survey import survey

import factorctl
from factorctl.checkpoint.builder import building, journal_path
from factorctl.checkpoint.manifest import MANIFEST_NAME, check_files, read_manifest
from factorctl.checkpoint.reader import INDEX_NAME, CheckpointReader
from factorctl.errors import FactorctlError, IntegrityError
from factorctl.exporting.gguf.tokenizer import read_tokenizer
from factorctl.exporting.reports import report_tables
from factorctl.files.publishing import partial_path
from factorctl.models.families import read_dense_model
from factorctl.models.loading import open_checkpoint
from factorctl.pipeline.common.model_card import native_card
from factorctl.pipeline.factorize.run import plan_factorize
from factorctl.pipeline.finetune.model import load_tokenizer
from factorctl.pipeline.inspect.inspect import inspect_checkpoint
from factorctl.progress import SilentProgress
from factorctl.training.state import read_record


@pytest.fixture
def native(bench: Bench, tmp_path: Path) -> Iterator[Sandbox]:
    sandbox = Sandbox(tmp_path / "native", bench.base)
    yield sandbox
    sandbox.assert_untouched()


@pytest.fixture
def dense(bench: Bench, tmp_path: Path) -> Iterator[Sandbox]:
    """A dense source in two shards, with an index."""
    sandbox = Sandbox(tmp_path / "dense", bench.made("export dense"))
    (sandbox.inside / MANIFEST_NAME).unlink()
    yield sandbox
    sandbox.assert_untouched()


def test_manifests(native: Sandbox, tally: Tally) -> None:
    native.add_traps()
    path = native.inside / MANIFEST_NAME

    def read(content: bytes) -> None:
        path.write_bytes(content)
        manifest = read_manifest(native.inside)
        for _ in check_files(native.inside, manifest, hashes=False):
            pass
        inspect_checkpoint(native.inside)
        native_card(manifest, {})

    try_cases(read, native.unsealed_manifest(), 3000, native, tally, MANIFEST_NAME)


def test_a_sealed_manifest_takes_no_change_at_all(native: Sandbox, tally: Tally) -> None:
    path = native.inside / MANIFEST_NAME
    valid = path.read_bytes()
    meant = json.loads(valid)

    def read(content: bytes) -> bool:
        path.write_bytes(content)
        read_manifest(native.inside)
        assert json.loads(content) == meant or "sha256" not in json.loads(content)
        return True

    try_cases(read, valid, 500, native, tally, f"{MANIFEST_NAME}, sealed")


@pytest.mark.parametrize("name", PATHS, ids=ascii)
def test_names_that_lead_elsewhere(name: str, native: Sandbox, tally: Tally) -> None:
    """In the manifest's files and in the index; neither is opened."""
    native.add_traps(".safetensors")
    manifest, index = (json.loads((native.inside / file).read_bytes()) for file in (MANIFEST_NAME, INDEX_NAME))
    shard = sorted(file for file in manifest["files"] if file.startswith("model-"))[0]
    manifest["files"][name] = manifest["files"].pop(shard)
    del manifest["sha256"]
    index["weight_map"] = {k: name if v == shard else v for k, v in index["weight_map"].items()}
    with tally.case("hostile file", "names that lead elsewhere"):
        (native.inside / INDEX_NAME).write_text(json.dumps(index))
        with pytest.raises(IntegrityError):
            CheckpointReader(native.inside)
        for trap in native.inside.glob("*.safetensors"):
            if trap.name not in manifest["files"] and trap.name != shard:
                trap.unlink()
        (native.inside / shard).unlink()
        (native.inside / MANIFEST_NAME).write_text(json.dumps(manifest))
        with pytest.raises(IntegrityError):
            list(check_files(native.inside, read_manifest(native.inside)))


def test_indexes(dense: Sandbox, tally: Tally) -> None:
    dense.add_traps(".safetensors")

    def read(content: bytes) -> None:
        (dense.inside / INDEX_NAME).write_bytes(content)
        CheckpointReader(dense.inside)

    try_cases(read, (dense.inside / INDEX_NAME).read_bytes(), 2000, dense, tally, INDEX_NAME)


def test_shard_headers(dense: Sandbox, tally: Tally) -> None:
    shard = next(dense.inside.glob("*.safetensors"))
    whole = shard.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    tensors = sorted(CheckpointReader.of_file(shard).entries)

    def read(header: bytes) -> bool:
        shard.write_bytes(struct.pack("<Q", len(header)) + header + whole[8 + length :])
        reader = CheckpointReader.of_file(shard)
        for name in reader.entries:
            reader.read(name)
        return sorted(reader.entries) == tensors

    try_cases(read, whole[8 : 8 + length].rstrip(), 1500, dense, tally, "header of a shard")


def test_configs_of_native_checkpoints(native: Sandbox, tally: Tally) -> None:
    def read(content: bytes) -> None:
        native.vouch("config.json", content)
        open_checkpoint(native.inside)

    try_cases(read, (native.inside / "config.json").read_bytes(), 1200, native, tally, "config.json, native")


def test_configs_of_dense_sources(dense: Sandbox, tally: Tally) -> None:
    def read(content: bytes) -> None:
        (dense.inside / "config.json").write_bytes(content)
        read_dense_model(dense.inside)

    try_cases(read, (dense.inside / "config.json").read_bytes(), 1000, dense, tally, "config.json, dense")


def test_models_from_hostile_configs(dense: Sandbox, native: Sandbox, tally: Tally) -> None:
    """As far as the structure of the model: sizes that no memory holds, layers without end."""

    def plan(content: bytes) -> None:
        (dense.inside / "config.json").write_bytes(content)
        plan_factorize(weights_only(dense.inside, dense.root / "out"), SilentProgress())

    def load(content: bytes) -> None:
        native.vouch("config.json", content)
        factorctl.load(native.inside)

    try_cases(plan, (dense.inside / "config.json").read_bytes(), 150, dense, tally, "config.json, planned")
    try_cases(load, (native.inside / "config.json").read_bytes(), 150, native, tally, "config.json, loaded")


@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "head_dim"])
@pytest.mark.parametrize("value", [0, -1, 3, 10**6, 10**9, 2**63, 10**30, 10**400, 1.5, "2", True, None, [2]], ids=str)
def test_sizes_that_no_model_has(field: str, value: object, dense: Sandbox, tally: Tally) -> None:
    config = json.loads((dense.inside / "config.json").read_bytes())
    content = json.dumps({**config, field: value}).encode()

    def plan(content: bytes) -> None:
        (dense.inside / "config.json").write_bytes(content)
        plan_factorize(weights_only(dense.inside, dense.root / "out"), SilentProgress())

    harmless = field == "head_dim" and value is None  # hidden_size / num_attention_heads, which is what it is
    case = Case("other value" if harmless else "not a number", content, f"{field} = {str(value)[:40]}")
    found = survey(plan, [case], dense.inside)
    tally.add("hostile file", "sizes that no model has", tried=1, survived=1 - len(found.failures))
    assert not found.failures, found.failures[0]


def test_tokenizers(native: Sandbox, tally: Tally) -> None:
    def read(content: bytes) -> None:
        (native.inside / "tokenizer.json").write_bytes(content)
        read_tokenizer(native.inside, vocab_size=300)

    try_cases(read, (native.inside / "tokenizer.json").read_bytes(), 300, native, tally, "tokenizer.json")


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_files_that_other_libraries_read(name: str, native: Sandbox, tally: Tally) -> None:
    """transformers reads them as it likes; what it makes of them must still reach the user as our error."""

    def read(content: bytes) -> bool:
        native.vouch(name, content)
        with contextlib.suppress(FactorctlError):
            factorctl.load(native.inside)
        with contextlib.suppress(FactorctlError):
            load_tokenizer(SimpleNamespace(checkpoint=open_checkpoint(native.inside)))  # type: ignore[arg-type]
        out = native.root / "out"
        with without_engines():
            outcome = cli("export", native.inside, "--to", "gguf", "--out", out, "-q")
        shutil.rmtree(out, ignore_errors=True)
        assert outcome.code in (0, 1, 2, 3), outcome
        return outcome.code == 0

    valid = (native.inside / name).read_bytes()
    hostile = [case for case in cases(valid, name, 33) if case.kind not in ("duplicate key", "nested deeply")]
    relaxed = [Case("read by others", case.content, case.what) for case in hostile]
    found = survey(read, relaxed, None)
    tally.add("hostile file", f"{name}, in use", tried=found.tried, survived=found.tried - len(found.failures))
    assert not found.failures, "\n\n".join(found.failures[:5])


def test_journals(native: Sandbox, tally: Tally) -> None:
    """An unfinished work's account of itself: one that cannot be trusted means to start over, never an error."""
    final = native.inside / "final"

    def shard(content: bytes) -> object:
        with building(final, num_shards=2, fingerprint="f", overwrite=False, progress=SilentProgress()) as builder:
            if not content:
                from torch import ones

                builder.write_shard(0, {"x": ones(3)}, {"note": [1, 2.5, None]})
            return builder.finished(0)

    def read(content: bytes) -> bool:
        partial_path(final).mkdir(exist_ok=True)
        (partial_path(final) / made.name).write_bytes(whole)
        journal_path(final).write_bytes(content)
        note = shard(b"x")
        assert note in (None, {"note": [1, 2.5, None]}), f"another note: {note}"
        return note is not None

    shard(b"")
    made = next(partial_path(final).glob("*.safetensors"))
    whole, valid = made.read_bytes(), journal_path(final).read_bytes()
    try_cases(read, valid, 500, native, tally, "journal")


def test_training_states(native: Sandbox, tally: Tally) -> None:
    path = native.inside / "state.json"
    record = {"step": 3, "tokens": 192, "notes": {"before": {"x": 1.5}}, "scalars": {"a": {"b": 1.0}}, "files": {}}

    def read(content: bytes) -> None:
        path.write_bytes(content)
        read_record(native.inside)

    from factorctl.files.strict_json import dump_sealed

    try_cases(read, dump_sealed(record), 300, native, tally, "state.json")


def test_reports_of_other_programs(native: Sandbox, tally: Tally) -> None:
    """They lie in the workspace and enter the card of an export; one that cannot be read is none."""
    sha256 = read_manifest(native.inside).sha256
    profiled = {"manifest_sha256": sha256, "latency": {"p50": 1.5}, "tokens": 12, "x": {"y": 1e300}}
    both = {"dense": 1.5, "model": 2.5}
    evaluated = {
        "manifest_sha256": sha256,
        "perplexity": {"text": both},
        "tasks": {"arc_easy": {**both, "metric": "acc", "kept": 0.9}},
        "average": {"kept": 0.9, "kept_above_chance": None},
    }

    def read(content: bytes) -> bool:
        (native.inside / "report.json").write_bytes(content)
        return bool(report_tables([native.inside], sha256))

    for report in (profiled, evaluated):
        try_cases(read, json.dumps(report).encode(), 300, native, tally, "report in the workspace")


def test_the_command_line_on_hostile_checkpoints(native: Sandbox, tally: Tally) -> None:
    """Through `main`: an exit code of our own, never a traceback."""
    valid = native.unsealed_manifest()
    rest = (["inspect", "--layer", 0], ["export", "--to", "dense", "--dry-run"])

    def read(content: bytes) -> bool:
        (native.inside / MANIFEST_NAME).write_bytes(content)
        codes = set()
        for verb, *options in (["verify"], ["inspect"], rest[len(content) % 2]):
            with without_engines():
                outcome = cli(verb, native.inside, *options)
            assert outcome.code in (0, 1, 2, 3), outcome
            assert outcome.code == 0 or outcome.stderr.strip(), "it says why"
            codes.add(outcome.code)
        return codes == {0}

    try_cases(read, valid, 200, native, tally, "all verbs that read", seed="command line")


def test_files_without_an_end(native: Sandbox, tally: Tally) -> None:
    """A pipe nobody writes to, a device, a loop of links, gigabytes of nothing, in place of a file that is read."""
    names = (MANIFEST_NAME, "config.json", INDEX_NAME, "tokenizer.json", "model-00001-of-00003.safetensors")
    for name in names:
        path = native.inside / name
        for trap in ("pipe", "device", "loop", "sparse"):
            content = path.read_bytes()
            path.unlink()
            if trap == "pipe":
                os.mkfifo(path)
            elif trap == "sparse":
                path.touch()
                os.truncate(path, 2**40)
            else:
                path.symlink_to("/dev/zero" if trap == "device" else path)
            case = Case("no object", b"", f"{name} is a {trap}")

            def read(_: bytes, name: str = name) -> None:
                factorctl.load(native.inside, verify=name != "tokenizer.json")
                raise AssertionError

            def alone(_: bytes, path: Path = path) -> None:
                CheckpointReader(path.parent) if path.suffix == ".safetensors" else read_dense_model(path.parent)

            is_mapped = path.suffix == ".safetensors" and trap == "sparse"  # which takes addresses, not memory
            has_reader = name in ("config.json", names[-1]) and not is_mapped
            for reader in (read, alone) if has_reader else (read,):
                found = survey(reader, [case], native.inside)
                tally.add("hostile file", "files without an end", tried=1, survived=1 - len(found.failures))
                assert not found.failures, found.failures[0]
            path.unlink()
            path.write_bytes(content)
