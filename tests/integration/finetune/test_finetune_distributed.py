"""Two gloo processes against one with the same global batch: with a model each (DDP), and sharing one (FSDP2)."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DenseSource
from support.tiny import calibrated, directory_bytes, factorize_quietly, make_documents, weights_only
from torch.distributed.tensor import DTensor

from factorctl.checkpoint.manifest import check_files, read_manifest
from factorctl.checkpoint.reader import CheckpointReader
from factorctl.config.finetune import FinetuneConfig
from factorctl.pipeline.finetune import run as pipeline
from factorctl.progress import SilentProgress
from factorctl.training.distiller import Distiller
from factorctl.training.loop import TrainingLoop
from factorctl.training.state import Progressed, newest_state

TOLERANCE = 2e-5
"""Largest difference of any weight after eight steps. The two add gradients in another order; AdamW's division by the
root of the second moment magnifies the rounding of values whose gradient is near zero, up to the learning rate."""
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ACCELERATE = ["accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"]
SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["factorctl.pipeline.finetune.run"])


@dataclass(frozen=True)
class Setting:
    """A run, and what one process alone makes of it."""

    config: FinetuneConfig
    alone: dict[str, Any]


@pytest.fixture(scope="module")
def setting(dense_source: DenseSource, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Three experts: two processes share them along another dimension than that of the experts."""
    root = tmp_path_factory.mktemp("distributed")
    factorize_quietly(weights_only(dense_source(), root / "base", num_experts=3, top_k=2))
    config = FinetuneConfig(
        tokens=1024,
        checkpoint=root / "base",
        data=str(make_documents(root / "text.jsonl", documents=60)),
        block_length=32,
        batch_tokens=128,
        micro_batch=2,
        router_lr=3.0,
        heldout_tokens=224,
        save_every=512,
        device="cpu",
        out=root / "alone",
    )
    return Setting(config, asdict(pipeline.finetune(config, SilentProgress())))


def launch(launcher: list[str], config: FinetuneConfig, out: Path) -> tuple[dict[str, Any], str]:
    """The run from the command line: the result that one process alone prints, and what was said on the way."""
    options = ["finetune", str(config.checkpoint), "--tokens", "1024", "--data", str(config.data), "--block-length"]
    options += ["32", "--batch-tokens", "128", "--micro-batch", "2", "--router-lr", "3", "--heldout-tokens", "224"]
    options += ["--device", "cpu", "--out", str(out), "--format", "json", "--save-every", "512"]
    command = [sys.executable, "-m", *launcher, "-m", "factorctl", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def assert_same_weights(mine: Path, other: Path, base: Path) -> None:
    ours, theirs, start = (CheckpointReader(path) for path in (mine, other, base))
    for name in ours.entries:
        difference = ours.read(name).double() - theirs.read(name).double()
        assert float(difference.abs().max()) < TOLERANCE, name
        if ".mlp." in name and not name.endswith("neuron_ids"):
            assert float((ours.read(name) - start.read(name)).abs().max()) > 10 * TOLERANCE, f"{name} did not learn"


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["DDP", "FSDP2"])
def test_two_processes_train_as_one(setting: Setting, tmp_path: Path, launcher: list[str]) -> None:
    two, said = launch(launcher, setting.config, tmp_path / "two")
    assert ("in each of 2 processes that share the model" in said) == (launcher is ACCELERATE)
    assert_same_weights(tmp_path / "two", setting.config.out, setting.config.checkpoint)
    assert two["perplexity_after"] == pytest.approx(setting.alone["perplexity_after"], rel=1e-5)
    assert two["perplexity_before"] == pytest.approx(setting.alone["perplexity_before"], rel=1e-6)
    assert two["router_agreement"] == pytest.approx(setting.alone["router_agreement"], abs=0.01)
    manifest = read_manifest(tmp_path / "two")
    assert manifest.details["training"]["world_size"] == 2
    assert len(list(check_files(tmp_path / "two", manifest))) == len(manifest.files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two", "two.training"]


@dataclass(frozen=True)
class Mishap:
    """What befalls the second of two processes."""

    interrupted_in: int | None = None
    """The step in the middle of which it is interrupted."""
    interrupted_after: int | None = None
    """The step at whose end, when the two have agreed to go on, it is interrupted."""
    late_to_save: bool = False
    """It looks for something to save when the first has long written its part."""


NO_MISHAP = Mishap()


def run_as(rank: int, port: int, config: FinetuneConfig, shares: bool, mishap: Mishap, cache: str) -> None:
    """One of two processes."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"ACCELERATE_USE_FSDP": str(shares), "FSDP_VERSION": "2", "FACTORCTL_CACHE": cache}
    genuine, steps = Distiller.forward, 0
    genuine_report, genuine_save_once = TrainingLoop._report, TrainingLoop._save_once

    def forward(this: Distiller, *args: Any, **options: Any) -> Any:
        nonlocal steps
        steps += torch.is_grad_enabled()
        if rank == 1 and steps == mishap.interrupted_in and torch.is_grad_enabled():
            signal.raise_signal(signal.SIGINT)
        return genuine(this, *args, **options)

    def report(this: TrainingLoop, now: Progressed, *args: Any) -> None:
        if rank == 1 and now.step == mishap.interrupted_after:
            signal.raise_signal(signal.SIGINT)
        genuine_report(this, now, *args)

    def save_once(this: TrainingLoop, now: Progressed) -> None:
        if rank == 1 and mishap.late_to_save:
            time.sleep(1)
        genuine_save_once(this, now)

    def load(*args: Any) -> Distiller:
        distiller = build(*args)
        spread = [p for p in distiller.parameters() if isinstance(p, DTensor)]
        assert len(spread) == shares * len(list(distiller.parameters())), "all are spread, or none"
        assert sum(p.to_local().numel() for p in spread) <= 0.6 * sum(p.numel() for p in spread)
        return distiller

    build = pipeline.build_distiller
    Distiller.forward = forward  # type: ignore[method-assign]
    TrainingLoop._report, TrainingLoop._save_once = report, save_once  # type: ignore[method-assign]
    pipeline.build_distiller = load
    pipeline.draw_training = lambda run, *_: (run / "training.png").write_bytes(b"")  # type: ignore[assignment]
    with suppress(KeyboardInterrupt):
        pipeline.finetune(config, SilentProgress())


def two(config: FinetuneConfig, mishap: Mishap = NO_MISHAP, *, shares: bool = True) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (port, config, shares, mishap, os.environ["FACTORCTL_CACHE"])
    processes = [SPAWN.Process(target=run_as, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    for process in processes:
        if process.is_alive():  # they wait for each other
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]


def test_a_shared_model_is_saved_and_resumed_bit_for_bit(
    dense_source: DenseSource, setting: Setting, text_file: Path, tmp_path: Path
) -> None:
    """With all that touches a layer out of turn: the layer loss alone, layers computed twice, rounds, a second unit."""
    factorize_quietly(calibrated(dense_source("llama-tied"), tmp_path / "base", text_file, top_k=2))
    changes: dict[str, Any] = {"loss_weights": {"kd": 0.0, "mse": 1.0}, "gradient_checkpointing": True}
    changes |= {"tokens": 512, "micro_batch": 1}
    config = replace(setting.config, checkpoint=tmp_path / "base", **changes)
    straight, broken, alone = (replace(config, out=tmp_path / name) for name in ("straight", "broken", "alone"))
    pipeline.finetune(alone, SilentProgress())
    two(straight)
    assert_same_weights(tmp_path / "straight", tmp_path / "alone", tmp_path / "base")
    two(broken, Mishap(interrupted_in=3))
    assert newest_state(tmp_path / "broken.training") == tmp_path / "broken.training" / "state-00000002"
    assert not (tmp_path / "broken").exists()
    two(replace(broken, resume=True))
    assert directory_bytes(tmp_path / "broken") == directory_bytes(tmp_path / "straight")


def test_a_run_of_whole_models_goes_on_with_a_shared_one(setting: Setting, tmp_path: Path) -> None:
    config = replace(setting.config, out=tmp_path / "tuned")
    two(config, Mishap(interrupted_in=3), shares=False)
    assert newest_state(tmp_path / "tuned.training") == tmp_path / "tuned.training" / "state-00000003"
    two(replace(config, resume=True))
    assert_same_weights(config.out, setting.config.out, setting.config.checkpoint)


def test_whole_models_wait_for_each_other_at_a_state_whoever_is_late(setting: Setting, tmp_path: Path) -> None:
    config = replace(setting.config, out=tmp_path / "late")
    two(config, Mishap(late_to_save=True), shares=False)
    assert_same_weights(config.out, setting.config.out, setting.config.checkpoint)


def test_both_stop_at_the_next_step_that_they_agree_on(setting: Setting, tmp_path: Path) -> None:
    """A signal that comes when a step's numbers have been exchanged is news to the other process."""
    config = replace(setting.config, out=tmp_path / "stopped")
    two(config, Mishap(interrupted_after=2), shares=False)
    assert newest_state(tmp_path / "stopped.training") == tmp_path / "stopped.training" / "state-00000003"
    assert not config.out.exists()
