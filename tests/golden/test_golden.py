"""A checkpoint of schema 1, made once and kept: every later version must load it and compute the same.

`schema-1/` is a one-layer Llama with biases: 4 experts of 5 neurons, 4 shared ones, fitted scale, refit.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.tiny import some_ids

import factorctl
from factorctl.checkpoint.manifest import read_manifest
from factorctl.progress import SilentProgress

HERE = Path(__file__).parent
CHECKPOINT = HERE / "schema-1"


def test_it_is_still_read_and_whole() -> None:
    from factorctl.pipeline.inspect.inspect import inspect_checkpoint
    from factorctl.pipeline.inspect.verify import verify_checkpoint

    manifest = read_manifest(CHECKPOINT)
    assert (manifest.kind, manifest.stage) == ("native", "factorize")
    verified = verify_checkpoint(CHECKPOINT, identity=True, progress=SilentProgress())
    assert verified.identity_error is not None
    assert verified.identity_error < 1e-5
    found = inspect_checkpoint(CHECKPOINT)
    assert found.strategy["name"] == "permuted"
    assert found.factored["scale"] == "fitted"


@pytest.mark.parametrize(("active", "top_k"), [("half", None), ("all", 4)])
@torch.no_grad()
def test_it_still_computes_what_it_did(active: str, top_k: int | None) -> None:
    expected = torch.tensor(json.loads((HERE / "schema-1.json").read_text())[active])
    model = factorctl.load(CHECKPOINT, top_k=top_k)
    assert torch.allclose(model(some_ids(1, 6)).logits[0, -1], expected, atol=2e-4)


def test_the_names_on_disk_have_not_changed() -> None:
    index = json.loads((CHECKPOINT / "model.safetensors.index.json").read_text())["weight_map"]
    ffn = {name.rpartition(".")[2] for name in index if ".mlp." in name}
    assert ffn == {
        "gate_up", "shared_gate_up", "down", "router", "gate_up_bias", "shared_gate_up_bias", "down_bias", "neuron_ids",
    }  # fmt: skip
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config.keys() == {"model_type", "architectures", "dense", "factored"}
