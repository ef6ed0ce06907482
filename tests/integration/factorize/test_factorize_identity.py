"""The keystone: with all experts on, a factored model is the dense model. Per family, strategy and dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import DenseSource
from support.tiny import CASES, INTERMEDIATE, calibrated, factorize_quietly, some_ids, weights_only

import factorctl
from factorctl.checkpoint import reader as checkpoint_reader
from factorctl.checkpoint.manifest import read_manifest
from factorctl.checkpoint.reader import CheckpointReader
from factorctl.ffn.slicing import unslice_ffn
from factorctl.models.building import factored_ffns
from factorctl.models.families import read_dense_model
from factorctl.models.loading import load_dense

STRATEGIES = ("contiguous", "permuted", "clustered")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LOGIT_TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
FFN_FIELDS = ("gate_FD", "up_FD", "down_DF", "gate_bias_F", "up_bias_F", "down_bias_D")


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(some_ids()).logits.float()


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def assert_every_bit_moved(source: Path, checkpoint: Path) -> None:
    """Each dense FFN, put together again from the shards, is the source's; each other tensor is as it was."""
    dense, before, after = read_dense_model(source), CheckpointReader(source), CheckpointReader(checkpoint)
    model = factorctl.load(checkpoint)
    ffn_names: set[str] = set()
    for layer, ffn in enumerate(factored_ffns(model)):
        original = dense.read_ffn(layer, before.read)
        restored = unslice_ffn(dict(ffn.state_dict()), ffn.shape)
        for field in FFN_FIELDS:
            ours, theirs = getattr(restored, field), getattr(original, field)
            assert (ours is None) == (theirs is None), field
            assert ours is None or torch.equal(ours, theirs), f"layer {layer}: {field}"
        assert sorted(ffn.neuron_ids.tolist()) == list(range(INTERMEDIATE))
        ffn_names |= set(dense.ffn_tensor_names(layer).values())
    others = [name for name in before.entries if name not in ffn_names]
    assert len(others) > 5
    for name in others:
        assert torch.equal(before.read(name), after.read(name)), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True], ids=["routed", "shared"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES)
def test_all_experts_on_is_the_dense_model(
    case: str, strategy: str, shared: bool, dtype: str, dense_source: DenseSource, text_file: Path, tmp_path: Path
) -> None:
    source, out = dense_source(case, dtype=DTYPES[dtype]), tmp_path / "out"
    config = weights_only(source, out, strategy=strategy)
    if shared:
        config = weights_only(
            source, out, strategy=strategy, shared_fraction=0.25, calibration=str(text_file), calibration_tokens=512
        )
    result = factorize_quietly(config)
    assert result.identity_error <= (1e-5 if dtype == "float32" else 1e-2)
    assert result.notation == ("1R4E2K+S12" if shared else "1R4E2K")
    assert (read_manifest(out).details["calibration"] is None) is not shared
    assert_every_bit_moved(source, out)
    dense = logits(load_dense(source))
    assert relative(logits(factorctl.load(out, top_k=4)), dense) <= LOGIT_TOLERANCE[dtype]
    assert relative(logits(factorctl.load(out)), dense) > 1e-2, "half of the experts must not be the dense model"


@pytest.mark.parametrize("case", CASES)
def test_the_closed_form_steps_bring_the_output_closer(
    case: str, dense_source: DenseSource, text_file: Path, tmp_path: Path
) -> None:
    source = dense_source(case)
    result = factorize_quietly(calibrated(source, tmp_path / "fitted", text_file, strategy="clustered"))
    assert result.identity_error <= 1e-5, "the identity is proved before values change"
    for record in result.layers:
        assert set(record["refit"]) == {"error_before", "error_after", "damping", "kept"}
        assert record["refit"]["error_after"] <= record["refit"]["error_before"]
        assert record["output_error"] == pytest.approx(record["refit"]["error_after"], rel=1e-3)
        assert record["refit"]["kept"] == (record["refit"]["error_after"] < record["refit"]["error_before"])
        assert 0.25 < record["shared_importance"] < 1, "the most important quarter holds more than a quarter"
    loaded = factorctl.load(tmp_path / "fitted")
    assert [ffn.scale_a for ffn in factored_ffns(loaded)] == [record["fitted_a"] for record in result.layers]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_generates_with_a_kv_cache(case: str, dense_source: DenseSource, tmp_path: Path) -> None:
    factorize_quietly(weights_only(dense_source(case), tmp_path / "out", strategy="permuted"))
    model = factorctl.load(tmp_path / "out")
    prompt = some_ids(rows=1, length=12)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached = model.generate(prompt, use_cache=True, **options)
    assert cached.shape == (1, 20)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))


@torch.no_grad()
def test_k_0_runs_the_shared_neurons_alone(dense_source: DenseSource, text_file: Path, tmp_path: Path) -> None:
    source, out = dense_source("llama-biases"), tmp_path / "out"
    config = calibrated(source, out, text_file, top_k=0, shared_fraction=0.5, router="random", scale="sum")
    result = factorize_quietly(config)
    assert (result.top_k, result.shared_size, result.active_ffn_fraction) == (0, 24, 0.5)
    model = factorctl.load(out)
    x_TD = torch.randn(5, 32)
    for ffn in factored_ffns(model):
        gate, up = torch.nn.functional.linear(x_TD, ffn.shared_gate_up, ffn.shared_gate_up_bias).split(24, dim=1)
        narrow = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, ffn.down[:, :24], ffn.down_bias)
        assert torch.allclose(ffn(x_TD), narrow, atol=1e-6)
    assert model.generate(some_ids(1, 4), max_new_tokens=4, min_new_tokens=4).shape == (1, 8)


@pytest.mark.parametrize(
    ("stored", "asked"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")]
)
def test_dtype_changes_the_storage_of_every_weight(
    stored: str, asked: str, dense_source: DenseSource, tmp_path: Path
) -> None:
    source = dense_source("llama-tied", dtype=DTYPES[stored])
    factorize_quietly(weights_only(source, tmp_path / "out", dtype=asked))
    entries = CheckpointReader(tmp_path / "out").entries.values()
    assert {e.dtype for e in entries if not e.name.endswith("neuron_ids")} == {getattr(torch, asked)}
    model = factorctl.load(tmp_path / "out", top_k=4)
    assert model.config.dtype == getattr(torch, asked)
    assert relative(logits(model), logits(load_dense(source))) < 3e-2


def test_load_casts_on_request(dense_source: DenseSource, tmp_path: Path) -> None:
    factorize_quietly(weights_only(dense_source(dtype=torch.bfloat16), tmp_path / "out"))
    model = factorctl.load(str(tmp_path / "out"), dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_headers_of_the_source_and_every_dense_ffn_are_read_once(
    dense_source: DenseSource, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, opened, tensors = dense_source(), list[Path](), list[str]()
    read_header, read_tensor = checkpoint_reader._read_header, CheckpointReader.read

    def noted_header(path: Path) -> list[checkpoint_reader.TensorEntry]:
        opened.append(path)
        return read_header(path)

    def noted(reader: CheckpointReader, name: str) -> torch.Tensor:
        tensors.append(name)
        return read_tensor(reader, name)

    monkeypatch.setattr(checkpoint_reader, "_read_header", noted_header)
    monkeypatch.setattr(CheckpointReader, "read", noted)
    factorize_quietly(calibrated(source, tmp_path / "out", text_file, top_k=2))
    assert [path for path in opened if path.parent == source] == [source / "model.safetensors"]
    ffns = [name for name in tensors if ".mlp." in name]
    assert len(ffns) == len(set(ffns)) == 3 * 2
