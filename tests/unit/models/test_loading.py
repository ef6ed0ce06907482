"""Native checkpoints as models: every tensor accounted for, and neurons moved there and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import DenseSource
from safetensors.torch import load_file, save_file
from support.tiny import calibrated, factorize_quietly, make_model, some_ids, weights_only

import factorctl
from factorctl.config.shape import FactorShape
from factorctl.contracts import DenseFFN, Partition
from factorctl.errors import FactorctlError, IntegrityError, UsageError
from factorctl.ffn.dense import dense_output
from factorctl.ffn.slicing import shared_ffn, slice_ffn, unslice_ffn
from factorctl.files.hashing import hash_file
from factorctl.models.building import factored_ffns
from factorctl.models.loading import load_dense


@pytest.fixture(scope="module")
def checkpoint(dense_source: DenseSource, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "tiny"
    factorize_quietly(calibrated(dense_source("llama-tied"), out, text_file))
    return out


@pytest.fixture
def changed(checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy whose tensors or config are changed and whose manifest vouches for the change."""

    def change(edit: Callable[[dict[str, torch.Tensor]], None] | None = None, **config: object) -> Path:
        copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
        if edit is not None:
            shard = sorted(copy.glob("model-*.safetensors"))[1]
            tensors = load_file(shard)
            edit(tensors)
            save_file(tensors, shard, metadata={"format": "pt"})
            index_file = copy / "model.safetensors.index.json"
            index = json.loads(index_file.read_text())
            index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != shard.name}
            index["weight_map"] |= dict.fromkeys(tensors, shard.name)
            index_file.write_text(json.dumps(index))
        if config:
            raw = json.loads((copy / "config.json").read_text())
            (copy / "config.json").write_text(json.dumps({**raw, **config}))
        manifest = json.loads((copy / "factorctl.json").read_text())
        for name in manifest["files"]:
            record = hash_file(copy / name)
            manifest["files"][name] = {"sha256": record.sha256, "size": record.size}
        del manifest["sha256"]
        (copy / "factorctl.json").write_text(json.dumps(manifest))
        return copy

    return change


MLP = "model.layers.0.mlp"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop(f"{MLP}.router"), rf"lacks tensor {MLP}\.router \(1 missing\)"),
        (lambda t: t.pop(f"{MLP}.neuron_ids"), "lacks tensor"),
        (lambda t: t.update({f"{MLP}.extra": torch.zeros(2)}), rf"holds tensor {MLP}\.extra, which its config has no"),
        (lambda t: t.update({f"{MLP}.router": torch.zeros(5, 32)}), r"router has shape \(5, 32\); its config says"),
        (lambda t: t[f"{MLP}.down"].fill_(float("nan")), rf"tensor {MLP}\.down in .* holds NaN or Inf"),
    ],
)
def test_tensors_that_are_not_as_they_must_be(
    edit: Callable[[dict[str, torch.Tensor]], None], words: str, changed: Callable[..., Path]
) -> None:
    with pytest.raises(IntegrityError, match=words):
        factorctl.load(changed(edit))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "llama"}, "is no factorctl config"),
        ({"dense": 3}, "is no factorctl config"),
        ({"factored": {}}, "the factored part is damaged"),
        ({"dense": {"model_type": "gpt2"}}, "'gpt2' model"),
    ],
)
def test_configs_that_are_not_ours(config: dict[str, object], words: str, changed: Callable[..., Path]) -> None:
    with pytest.raises(FactorctlError, match=words):
        factorctl.load(changed(**config))


def test_a_file_that_the_manifest_does_not_vouch_for(checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    manifest = json.loads((copy / "factorctl.json").read_text())
    del manifest["files"]["config.json"], manifest["sha256"]
    (copy / "factorctl.json").write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match=r"config\.json is not in the manifest"):
        factorctl.load(copy)


def test_an_export_is_not_loaded_as_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    manifest = json.loads((copy / "factorctl.json").read_text())
    (copy / "factorctl.json").write_text(json.dumps({**manifest, "kind": "export", "sha256": None}))
    with pytest.raises(UsageError, match="is an export") as caught:
        factorctl.load(copy)
    assert "from_pretrained" in str(caught.value)


def test_another_top_k_and_scale(checkpoint: Path) -> None:
    model = factorctl.load(checkpoint, top_k=3, scale="paper")
    assert {ffn.top_k for ffn in factored_ffns(model)} == {3}
    assert {ffn.scale_a for ffn in factored_ffns(model)} == {4 / 3}
    with pytest.raises(UsageError, match="were fitted for top-k 2, not 3"):
        factorctl.load(checkpoint, top_k=3)
    with pytest.raises(UsageError, match="--top-k 5 does not fit"):
        factorctl.load(checkpoint, top_k=5)


def test_tied_embeddings_stay_one_tensor(checkpoint: Path) -> None:
    model = factorctl.load(checkpoint)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert "lm_head.weight" not in json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]


@torch.no_grad()
def test_surplus_tensors_of_old_writers(dense_source: DenseSource, tmp_path: Path) -> None:
    source = Path(shutil.copytree(dense_source("llama-tied"), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    expected = make_model("llama-tied")(some_ids()).logits
    assert torch.allclose(load_dense(source)(some_ids()).logits, expected, atol=1e-5)
    factorize_quietly(weights_only(source, tmp_path / "out"))
    assert torch.allclose(factorctl.load(tmp_path / "out", top_k=4)(some_ids()).logits, expected, atol=1e-4)


@pytest.mark.parametrize("shared", [0, 4])
@pytest.mark.parametrize("biases", [False, True])
def test_neurons_move_there_and_back(shared: int, biases: bool) -> None:
    shape = FactorShape(num_experts=5, top_k=2, expert_size=4, shared_size=shared)
    neurons = shape.intermediate_size
    weights = [torch.randn(neurons, 6), torch.randn(neurons, 6), torch.randn(6, neurons)]
    ffn = DenseFFN(*weights, *([torch.randn(neurons), torch.randn(neurons), torch.randn(6)] if biases else []))
    ids = torch.randperm(neurons)
    partition = Partition(ids[shared:].view(5, 4), ids[:shared] if shared else None)
    tensors = slice_ffn(ffn, partition, torch.zeros(5, 6))
    assert tensors["neuron_ids"].tolist() == ids.tolist()
    assert torch.equal(tensors["gate_up"][3, 1], ffn.gate_FD[ids[shared + 13]])
    assert torch.equal(tensors["gate_up"][3, 4 + 1], ffn.up_FD[ids[shared + 13]])
    assert torch.equal(tensors["down"][:, shared + 13], ffn.down_DF[:, ids[shared + 13]])
    back = unslice_ffn(tensors, shape)
    for name in ("gate_FD", "up_FD", "down_DF", "gate_bias_F", "up_bias_F", "down_bias_D"):
        ours, theirs = getattr(back, name), getattr(ffn, name)
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)
    if shared:
        x_TD = torch.randn(3, 6)
        narrow = dense_output(shared_ffn(tensors, shape), "silu", x_TD)
        assert torch.allclose(narrow, dense_output(ffn.select(ids[:shared]), "silu", x_TD), atol=1e-6)
