"""`finetune` on CUDA: what saves memory there, what is compiled, and several GPUs that share one model."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import directory_bytes, spy_on_routers

from factorctl.checkpoint.reader import CheckpointReader
from factorctl.config.finetune import FinetuneConfig
from factorctl.errors import ResourceError
from factorctl.pipeline.finetune.run import FinetuneResult, finetune, rehearse
from factorctl.progress import SilentProgress
from factorctl.training import optimizers
from factorctl.training.loop import TrainingLoop
from factorctl.training.twin_ffn import TwinFFN

pytestmark = pytest.mark.gpu


def config(checkpoint: Path, text: Path, out: Path, **changes: Any) -> FinetuneConfig:
    sizes = {"block_length": 32, "batch_tokens": 128, "heldout_tokens": 128}
    plain = FinetuneConfig(tokens=640, checkpoint=checkpoint, data=str(text), device="cuda", out=out, **sizes)
    return dataclasses.replace(plain, **changes)


def tune(config: FinetuneConfig) -> FinetuneResult:
    return finetune(config, SilentProgress())


def test_float32_on_a_gpu_is_the_cpu_up_to_rounding(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    here = tune(config(checkpoint, text, tmp_path / "cuda", precision="float32"))
    there = tune(config(checkpoint, text, tmp_path / "cpu", device="cpu"))
    assert here.perplexity_dense == pytest.approx(there.perplexity_dense, rel=1e-4)
    assert here.perplexity_after == pytest.approx(there.perplexity_after, rel=1e-3)
    assert here.peak_memory_bytes > 0


def test_bfloat16_is_the_default_and_routers_stay_in_float32(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes = spy_on_routers(monkeypatch)
    rough = tune(config(checkpoint, text, tmp_path / "rough"))
    assert dtypes == {(torch.bfloat16, torch.float32)}
    exact = tune(config(checkpoint, text, tmp_path / "exact", device="cpu"))
    assert rough.perplexity_after == pytest.approx(exact.perplexity_after, rel=0.05)
    assert CheckpointReader(tmp_path / "rough").entry("model.layers.0.mlp.gate_up").dtype == torch.float32


@pytest.mark.parametrize("storage", ["bf16", "8bit", "4bit"])
def test_a_quantised_teacher_teaches(refitted: Path, text: Path, tmp_path: Path, storage: Any) -> None:
    exact = tune(config(refitted, text, tmp_path / "exact"))
    rough = tune(config(refitted, text, tmp_path / "rough", teacher_quant=storage))
    assert rough.perplexity_dense == pytest.approx(exact.perplexity_dense, rel=0.3)
    assert rough.perplexity_before == pytest.approx(exact.perplexity_before, rel=1e-3), "the student is not quantised"


def test_eight_bit_adamw_comes_back_from_a_saved_state(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "MIN_8BIT_SIZE", 0)
    changes: dict[str, Any] = {"optimizer": "adamw-8bit", "save_every": 128}
    straight = tune(config(checkpoint, text, tmp_path / "straight", **changes))
    broken = config(checkpoint, text, tmp_path / "broken", **changes)
    with monkeypatch.context() as patch:
        genuine, calls = TrainingLoop._gradients, 0

        def interrupted(self: TrainingLoop, *args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2:
                signal.raise_signal(signal.SIGINT)
            return genuine(self, *args)

        patch.setattr(TrainingLoop, "_gradients", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune(broken)
    saved = CheckpointReader.of_file(tmp_path / "broken.training" / "state-00000002" / "layer-00000.safetensors")
    states = {name: saved.read(name).dtype for name in saved.entries if name.startswith("optimizer/")}
    assert {dtype for name, dtype in states.items() if name.endswith("down/state1")} == {torch.uint8}
    assert {dtype for name, dtype in states.items() if "router/exp_avg" in name} == {torch.float32}
    resumed = tune(dataclasses.replace(broken, resume=True))
    assert resumed.perplexity_after == pytest.approx(straight.perplexity_after, rel=1e-3)


def test_compiled_layers_give_the_same_losses(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    plain = tune(config(checkpoint, text, tmp_path / "plain"))
    compiled = tune(config(checkpoint, text, tmp_path / "compiled", compile=True))
    assert compiled.losses["kd"] == pytest.approx(plain.losses["kd"], rel=0.05)


def test_everything_that_saves_memory_at_once(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    exact = tune(config(checkpoint, text, tmp_path / "exact", device="cpu"))
    saving: dict[str, Any] = {"teacher_quant": "4bit", "optimizer": "adamw-8bit", "gradient_checkpointing": True}
    lean = tune(config(checkpoint, text, tmp_path / "lean", **saving))
    assert lean.perplexity_after == pytest.approx(exact.perplexity_after, rel=0.1)


def test_running_out_of_memory_saves_and_says_what_to_change(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device's own error, from a layer that asks for more than there is in the third step."""
    short = config(checkpoint, text, tmp_path / "tuned", save_every=640)
    with monkeypatch.context() as patch:
        genuine, calls = TwinFFN._study, 0

        def greedy(self: TwinFFN, x: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += torch.is_grad_enabled()
            if calls == 5:  # two layers a step
                torch.empty(2**50, device=x.device)
            return genuine(self, x)

        patch.setattr(TwinFFN, "_study", greedy)
        with pytest.raises(ResourceError, match=r"out of memory in step 3 .*; the state 256 tokens in is saved"):
            tune(short)
    assert tune(dataclasses.replace(short, resume=True)).steps == 5


def test_the_rehearsal_expects_at_least_what_it_used(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    found = rehearse(config(checkpoint, text, tmp_path / "tuned"), SilentProgress())
    assert found.peak_memory_bytes < found.expected_memory_bytes
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quant", ["none", "4bit"])
def test_two_gpus_share_one_model(checkpoint: Path, text: Path, tmp_path: Path, quant: str) -> None:
    """Over NCCL; the quantised teacher lies whole on each."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    alone = config(checkpoint, text, tmp_path / "alone", precision="float32", micro_batch=2, teacher_quant=quant)
    tune(alone)
    launcher = ["accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"]
    options = [
        "finetune",
        str(checkpoint),
        "--tokens",
        "640",
        "--data",
        str(text),
        "--block-length",
        "32",
        "--micro-batch",
    ]
    options += ["2", "--batch-tokens", "128", "--heldout-tokens", "128", "--precision", "float32", "--teacher-quant"]
    options += [quant, "--out", str(tmp_path / "two")]
    subprocess.run([sys.executable, "-m", *launcher, "-m", "factorctl", *options], check=True, env=os.environ)
    assert directory_bytes(tmp_path / "two").keys() == directory_bytes(tmp_path / "alone").keys()
    ours, theirs = CheckpointReader(tmp_path / "two"), CheckpointReader(tmp_path / "alone")
    for name in ours.entries:
        torch.testing.assert_close(ours.read(name), theirs.read(name), atol=2e-4, rtol=0)
