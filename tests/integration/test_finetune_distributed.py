"""Two gloo processes against one process with the same global batch."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DenseSource
from helpers import LETTERS, factorize_quietly, weights_only

from factorctl.checkpoint.manifest import read_manifest
from factorctl.checkpoint.reader import CheckpointReader

TOLERANCE = 2e-5
"""Largest difference of any weight after eight steps. The two add gradients in another order; AdamW's division by the
root of the second moment magnifies the rounding of values whose gradient is near zero, up to the learning rate."""


def launch(processes: int, base: Path, text: Path, out: Path) -> dict[str, object]:
    options = ["finetune", str(base), "--tokens", "1024", "--data", str(text), "--block-length", "32"]
    options += ["--batch-tokens", "128", "--micro-batch", "2", "--heldout-tokens", "224", "--device", "cpu"]
    options += ["--out", str(out), "--format", "json", "--save-every", "512"]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "factorctl", *options]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout)  # one process alone prints
    return result


@pytest.fixture(scope="module")
def material(dense_source: DenseSource, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("distributed")
    factorize_quietly(weights_only(dense_source(), root / "base", top_k=2))
    draw = random.Random(0)
    texts = [" ".join("".join(draw.choices(LETTERS, k=5)) for _ in range(20)) for _ in range(60)]
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return root / "base", root / "text.jsonl"


def test_two_processes_train_as_one(material: tuple[Path, Path], tmp_path: Path) -> None:
    one = launch(1, *material, tmp_path / "one")
    two = launch(2, *material, tmp_path / "two")
    ours, theirs, base = (CheckpointReader(path) for path in (tmp_path / "two", tmp_path / "one", material[0]))
    for name in ours.entries:
        mine, other, start = ours.read(name), theirs.read(name), base.read(name)
        assert float((mine.double() - other.double()).abs().max()) < TOLERANCE, name
        if ".mlp." in name and not name.endswith("neuron_ids"):
            assert float((mine - start).abs().max()) > 10 * TOLERANCE, f"{name} did not learn"
    assert torch.allclose(torch.tensor(one["perplexity_after"]), torch.tensor(two["perplexity_after"]), rtol=1e-5)
    assert one["perplexity_before"] == pytest.approx(two["perplexity_before"], rel=1e-6)
    assert one["router_agreement"] == pytest.approx(two["router_agreement"], abs=0.01)
    assert read_manifest(tmp_path / "two").details["training"]["world_size"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "one.training", "two", "two.training"]
