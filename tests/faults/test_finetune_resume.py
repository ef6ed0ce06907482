"""A training run that is killed, stopped or broken at any moment goes on as if nothing had been."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DenseSource
from support.tiny import LETTERS, directory_bytes, factorize_quietly, leftovers, weights_only

from factorctl.checkpoint.manifest import is_artefact
from factorctl.checkpoint.reader import CheckpointReader
from factorctl.config.finetune import FinetuneConfig
from factorctl.errors import FactorctlError, IntegrityError, ResourceError, UsageError
from factorctl.pipeline.finetune import run as pipeline
from factorctl.progress import SilentProgress
from factorctl.training import optimizers, state
from factorctl.training.distiller import Distiller

SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["factorctl.pipeline.finetune.run"])
STEPS = 6


def write_text(path: Path, documents: int = 60, seed: int = 0) -> Path:
    draw = random.Random(seed)
    texts = [" ".join("".join(draw.choices(LETTERS, k=5)) for _ in range(20)) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training does here; test_training_recipe.py draws."""
    monkeypatch.setattr(pipeline, "draw_training", lambda run, *_: (run / "training.png").write_bytes(b""))


@dataclasses.dataclass(frozen=True)
class Setting:
    config: FinetuneConfig
    straight: dict[str, bytes]
    """Every file of the checkpoint of a run that nothing disturbed."""


@pytest.fixture(scope="module")
def setting(dense_source: DenseSource, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("resume")
    factorize_quietly(weights_only(dense_source(), root / "base", top_k=2))
    config = FinetuneConfig(
        tokens=STEPS * 64,
        checkpoint=root / "base",
        data=str(write_text(root / "text.jsonl")),
        block_length=32,
        batch_tokens=64,
        micro_batch=1,
        heldout_tokens=64,
        save_every=128,
        device="cpu",
        out=root / "straight" / "tuned",
    )
    run(config)
    return Setting(config, directory_bytes(config.out))


def run(config: FinetuneConfig) -> SilentProgress:
    progress = SilentProgress()
    pipeline.finetune(config, progress)
    return progress


def elsewhere(setting: Setting, tmp_path: Path, **changes: Any) -> FinetuneConfig:
    return dataclasses.replace(setting.config, out=tmp_path / "tuned", **changes)


def killed_at(config: FinetuneConfig, where: str, nth: int, cache: str) -> None:
    """Runs in a process of its own, which ends itself without warning before the nth call of `where`."""
    os.environ["FACTORCTL_CACHE"] = cache
    module_name, _, name = where.rpartition(":")
    holder: Any = importlib.import_module(module_name)
    *path, name = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    genuine, calls = getattr(holder, name), 0

    def deadly(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return genuine(*args, **options)

    setattr(holder, name, deadly)
    pipeline.finetune(config, SilentProgress())


def kill(config: FinetuneConfig, where: str, nth: int) -> None:
    process = SPAWN.Process(target=killed_at, args=(config, where, nth, os.environ["FACTORCTL_CACHE"]))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, "the fault point was not reached"


STATE, OUTPUT = "factorctl.training.state", "factorctl.checkpoint.builder"
FAULTS = {
    "before any state": ("torch.optim:AdamW.step", 1),
    "between two states": ("torch.optim:AdamW.step", 11),
    "in a later step's metrics": ("factorctl.training.metrics:MetricsFile.append", 5),
    "at the first byte of the first state": (f"{STATE}:write_shard", 1),
    "in the middle of a later save": (f"{STATE}:write_shard", 4),
    "before state.json": (f"{STATE}:write_file", 2),
    "before a state gets its name": (f"{STATE}:publish_directory", 2),
    "before the old state is removed": (f"{STATE}:remove_states", 3),
    "while the checkpoint is written": (f"{OUTPUT}:write_shard", 2),
    "before the checkpoint gets its name": (f"{OUTPUT}:publish_directory", 1),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.fault("SIGKILL in a process of its own", "finetune")
def test_killed_and_resumed_is_bit_for_bit_never_killed(setting: Setting, tmp_path: Path, fault: str) -> None:
    config = elsewhere(setting, tmp_path)
    kill(config, *FAULTS[fault])
    assert not config.out.exists()
    run(dataclasses.replace(config, resume=True))
    assert directory_bytes(config.out) == setting.straight
    assert leftovers(config.out) == []
    kept = sorted(path.name for path in Path(f"{config.out}.training").iterdir())
    assert kept == ["metrics.jsonl", "run.json", "training.png"]
    steps = [json.loads(line)["step"] for line in Path(f"{config.out}.training/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.fault("SIGKILL in a process of its own", "finetune")
def test_killed_twice(setting: Setting, tmp_path: Path) -> None:
    config = elsewhere(setting, tmp_path)
    kill(config, "torch.optim:AdamW.step", 5)
    kill(dataclasses.replace(config, resume=True), f"{STATE}:write_shard", 2)
    progress = run(dataclasses.replace(config, resume=True))
    assert any(note.startswith("resuming from step 2 ") for note in progress.notes)
    assert directory_bytes(config.out) == setting.straight


class _StopAfter:
    """Sends this process a signal in the middle of a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
        genuine, calls = Distiller.forward, 0

        def forward(this: Distiller, *args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += torch.is_grad_enabled()
            if calls == 2 * step - 1 and torch.is_grad_enabled():  # two micro-batches a step
                act()
            return genuine(this, *args, **options)

        monkeypatch.setattr(Distiller, "forward", forward)


@pytest.mark.fault("Ctrl-C or SIGTERM", "finetune, in a step")
def test_ctrl_c_finishes_the_step_saves_and_resumes(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = elsewhere(setting, tmp_path)
    with monkeypatch.context() as patch:
        _StopAfter(patch, 3, lambda: signal.raise_signal(signal.SIGINT))
        progress = SilentProgress()
        with pytest.raises(KeyboardInterrupt):
            pipeline.finetune(config, progress)
    assert progress.notes[-1] == "saved 192 tokens in; go on with the same command and --resume"
    assert state.newest_state(Path(f"{config.out}.training")).name == "state-00000003"
    run(dataclasses.replace(config, resume=True))
    assert directory_bytes(config.out) == setting.straight


@pytest.mark.fault("Ctrl-C or SIGTERM", "finetune, in a step")
def test_a_signal_in_the_last_step_is_not_lost(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = elsewhere(setting, tmp_path)
    with monkeypatch.context() as patch:
        _StopAfter(patch, STEPS, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            pipeline.finetune(config, SilentProgress())
    assert not config.out.exists()
    run(dataclasses.replace(config, resume=True))
    assert directory_bytes(config.out) == setting.straight


@pytest.mark.fault("Ctrl-C or SIGTERM", "finetune, in a step")
def test_sigterm_through_the_command_line(setting: Setting, tmp_path: Path) -> None:
    """Exit code 143, the state saved, the hint shown; and the command line resumes."""
    config = setting.config
    command = [sys.executable, "-m", "factorctl", "finetune", str(config.checkpoint), "--tokens", "1M"]
    command += ["--data", str(config.data), "--block-length", "32", "--batch-tokens", "64", "--heldout-tokens", "64"]
    command += ["--max-epochs", "1000", "--device", "cpu", "--out", str(tmp_path / "tuned")]
    metrics = tmp_path / "tuned.training" / "metrics.jsonl"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (metrics.exists() and metrics.read_text()):
            time.sleep(0.05)
        process.terminate()
        errors = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "go on with the same command and --resume" in errors
    assert state.newest_state(tmp_path / "tuned.training") is not None


@pytest.mark.fault("loss that is no number", "finetune")
def test_a_loss_that_is_no_number_stops_at_the_last_good_state(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = elsewhere(setting, tmp_path)
    with monkeypatch.context() as patch:
        genuine, calls = Distiller.forward, 0

        def poisoned(this: Distiller, *args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += torch.is_grad_enabled()
            report = genuine(this, *args, **options)
            return report._replace(total=report.total * float("nan")) if calls == 9 else report

        patch.setattr(Distiller, "forward", poisoned)
        with pytest.raises(FactorctlError) as stopped:
            run(config)
    message = str(stopped.value)
    assert message.startswith("step 5 (256 tokens in): a loss or gradient is not finite (")
    assert "total nan" in message
    assert f"the last good state is {config.out}.training/state-00000004" in message
    assert "lower --lr" in message
    run(dataclasses.replace(config, resume=True))
    assert directory_bytes(config.out) == setting.straight


@pytest.mark.fault("GPU out of memory", "finetune")
def test_out_of_memory_saves_and_says_what_to_change(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    config = elsewhere(setting, tmp_path, micro_batch=2)
    with monkeypatch.context() as patch:
        _StopAfter(patch, 2, exhausted)
        with pytest.raises(ResourceError) as refused:
            run(config)
    message = str(refused.value)
    assert "out of memory in step 3 with 2 x 32 tokens at once; peak " in message
    assert "the state 128 tokens in is saved" in message
    assert "--resume and --micro-batch 1 or --gradient-checkpointing" in message
    run(dataclasses.replace(config, resume=True, micro_batch=1))
    assert is_artefact(config.out), "how the same steps are computed may change"


@pytest.mark.parametrize(
    ("holder", "name", "nth", "where", "kept"),
    [
        (Distiller, "forward", 1, "before training", "no step was taken"),
        (torch.optim.AdamW, "step", 1, "in step 1", "no state was saved before"),
        (torch.optim.AdamW, "step", 7, "in step 4", "the last good state is .*/state-00000002"),
    ],
)
@pytest.mark.fault("GPU out of memory", "finetune")
def test_out_of_memory_where_nothing_more_can_be_saved(
    setting: Setting,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    holder: Any,
    name: str,
    nth: int,
    where: str,
    kept: str,
) -> None:
    """While the held-out text is measured, or while weights move: another state would be neither old nor new."""
    genuine, calls = getattr(holder, name), 0

    def exhausted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return genuine(*args, **options)

    config = elsewhere(setting, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(holder, name, exhausted)
        with pytest.raises(ResourceError) as refused:
            run(config)
    assert re.match(f"out of memory {where} with 1 x 32 tokens at once; peak [0-9.]+ GB; {kept}\\n", str(refused.value))
    assert "accelerate launch --use_fsdp --fsdp_version 2" in str(refused.value)
    run(dataclasses.replace(config, resume=True))
    assert directory_bytes(config.out) == setting.straight


@pytest.mark.fault("disk full at a write point", "finetune, a state")
def test_a_full_disk_keeps_the_older_state(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = elsewhere(setting, tmp_path)
    with monkeypatch.context() as patch:
        genuine, calls = state.write_shard, 0

        def full(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 4:
                with state.writable(args[0]):
                    raise OSError(errno.ENOSPC, "No space left on device")
            return genuine(*args)

        patch.setattr(state, "write_shard", full)
        with pytest.raises(ResourceError, match=r"no space left while writing .*layer-00001"):
            run(config)
    assert state.newest_state(Path(f"{config.out}.training")).name == "state-00000002"
    run(dataclasses.replace(config, resume=True))
    assert directory_bytes(config.out) == setting.straight


def stopped_early(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> FinetuneConfig:
    """A run that was interrupted after two steps."""
    config = elsewhere(setting, tmp_path, **changes)
    with monkeypatch.context() as patch:
        _StopAfter(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            run(config)
    return config


def test_eight_bit_optimizer_states_come_back_too(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes, their scales and maps, and a step count that is no tensor."""
    monkeypatch.setattr(optimizers, "MIN_8BIT_SIZE", 0)
    straight = dataclasses.replace(setting.config, out=tmp_path / "straight", optimizer="adamw-8bit")
    run(straight)
    config = stopped_early(setting, tmp_path, monkeypatch, optimizer="adamw-8bit")
    saved = CheckpointReader.of_file(tmp_path / "tuned.training" / "state-00000002" / "layer-00000.safetensors")
    assert {saved.read(name).dtype for name in saved.entries if name.endswith("state1")} == {torch.uint8}
    run(dataclasses.replace(config, resume=True))
    assert directory_bytes(config.out) == directory_bytes(straight.out)


@pytest.mark.parametrize(
    "changes",
    [
        {"router_refresh": 192, "refresh_target": "labels", "straight_through": True},
        {"router_refresh": 192, "refresh_target": "benefits", "heal_tokens": 256},
        {"optimizer": "muon", "sharpness_lr": 0.0},
    ],
    ids=["refresh", "heal", "muon"],
)
def test_what_routers_and_matrices_have_collected_comes_back(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Stopped half way between two fits; with a sharpness that was found on the first text and never trained."""
    straight = dataclasses.replace(setting.config, out=tmp_path / "straight", **changes)
    run(straight)
    config = stopped_early(setting, tmp_path, monkeypatch, **changes)
    saved = CheckpointReader.of_file(tmp_path / "tuned.training" / "state-00000002" / "layer-00000.safetensors")
    assert any(name.endswith(".sharpness") for name in saved.entries)
    if "router_refresh" in changes:
        gram = next(name for name in saved.entries if name.endswith(".moments.upper_II"))
        assert float(saved.read(gram).trace()) > 0
    run(dataclasses.replace(config, resume=True))
    assert directory_bytes(config.out) == directory_bytes(straight.out)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"lr": 1e-3}, "lr: was 0.0005, now 0.001"),
        ({"seed": 1}, "seed: was 0, now 1"),
        ({"tokens": 640}, "tokens: was 384, now 640"),
        ({"loss_weights": {"z": 0.1}}, "loss_weights: was {"),
    ],
)
@pytest.mark.fault("resumed with another configuration", "finetune")
def test_another_configuration_is_refused_with_the_difference(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], difference: str
) -> None:
    config = stopped_early(setting, tmp_path, monkeypatch)
    with pytest.raises(UsageError) as refused:
        run(dataclasses.replace(config, resume=True, **changes))
    assert "was started differently:\n" in str(refused.value)
    assert difference in str(refused.value)


@pytest.mark.fault("resumed with another configuration", "finetune")
def test_other_data_or_another_base_is_refused(
    setting: Setting, dense_source: DenseSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_text(tmp_path / "text.jsonl")
    config = stopped_early(setting, tmp_path, monkeypatch, data=str(text))
    write_text(text, seed=1)
    with pytest.raises(UsageError, match=r"  text: was '[0-9a-f]{64}', now '[0-9a-f]{64}'"):
        run(dataclasses.replace(config, resume=True))
    write_text(text)
    factorize_quietly(weights_only(dense_source(), tmp_path / "other", top_k=2, strategy="permuted"))
    with pytest.raises(UsageError, match="  base checkpoint: was '"):
        run(dataclasses.replace(config, resume=True, checkpoint=tmp_path / "other"))


@pytest.mark.fault("resumed with another configuration", "finetune")
def test_another_world_size_is_refused(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = stopped_early(setting, tmp_path, monkeypatch)
    changed = json.loads((tmp_path / "tuned.training" / "run.json").read_text()) | {"world size": 2}
    (tmp_path / "tuned.training" / "run.json").write_text(json.dumps(changed))
    with pytest.raises(UsageError, match="  world size: was 2, now 1"):
        run(dataclasses.replace(config, resume=True))


def test_nothing_to_resume(setting: Setting, tmp_path: Path) -> None:
    config = elsewhere(setting, tmp_path, resume=True)
    with pytest.raises(UsageError, match=r"there is nothing to resume: .*tuned\.training holds no run"):
        run(config)
    finished = dataclasses.replace(setting.config, resume=True)
    with pytest.raises(UsageError, match=r"there is nothing to resume: .*tuned is finished"):
        run(finished)


@pytest.mark.fault("output exists", "finetune, unfinished")
def test_an_unfinished_run_is_not_trampled_on(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stopped_early(setting, tmp_path, monkeypatch)
    with pytest.raises(UsageError, match=r"an unfinished run lies in .*\nHint: go on with --resume, or start over"):
        run(config)
    run(dataclasses.replace(config, overwrite=True))
    assert directory_bytes(config.out) == setting.straight


@pytest.mark.fault("damaged bytes, refused by every verb", "training state")
def test_a_damaged_state_is_named(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = stopped_early(setting, tmp_path, monkeypatch)
    shard = tmp_path / "tuned.training" / "state-00000002" / "layer-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(IntegrityError, match=r"layer-00001\.safetensors is not what was saved"):
        run(dataclasses.replace(config, resume=True))


@pytest.mark.fault("two writers of one output", "finetune, a run")
def test_two_runs_in_one_place_are_refused(setting: Setting, tmp_path: Path) -> None:
    config = elsewhere(setting, tmp_path)
    with (
        pipeline.sole_writer(Path(f"{config.out}.training")),
        pytest.raises(UsageError, match="is being written by process"),
    ):
        run(config)
