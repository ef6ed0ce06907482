"""What accelerate's environment asks of `finetune`: refused in a line, or said not to be used and kept from acting."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, patch_environment
from support.tiny import directory_bytes

from factorctl.config.finetune import FinetuneConfig
from factorctl.errors import UsageError
from factorctl.pipeline.finetune.model import make_accelerator
from factorctl.pipeline.finetune.plan import plan_finetune
from factorctl.pipeline.finetune.run import finetune, rehearse
from factorctl.progress import SilentProgress
from factorctl.training.accelerate_settings import NEUTRAL, refuse_other_trainers, unused_settings

SETTINGS = {
    "ACCELERATE_MIXED_PRECISION": "fp16",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
}
LAUNCHED = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_USE_CPU": "False",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
}
"""What `accelerate launch` sets where nothing was asked for."""


@pytest.fixture(autouse=True)
def _fresh_state() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize(
    ("variable", "trainer"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism config"),
        ("ACCELERATE_USE_SAGEMAKER", "SageMaker"),
    ],
)
@pytest.mark.parametrize("value", ["true", "True", "1"])
def test_other_trainers_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    variable: str,
    trainer: str,
    value: str,
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError) as refused:
        rehearse(
            FinetuneConfig(tokens=128, checkpoint=checkpoint, data=str(text), out=tmp_path / "o"), SilentProgress()
        )
    assert refused.value.message.startswith(f"finetune does not train with {trainer}")
    assert variable in refused.value.message
    assert refused.value.hint is not None
    assert "--use_fsdp --fsdp_version 2" in refused.value.hint


@pytest.mark.parametrize("variables", [{"ACCELERATE_USE_CPU": "True"}, {"ACCELERATE_TORCH_DEVICE": "cpu:0"}])
def test_another_device_is_refused(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refuse_other_trainers("cpu")
    with pytest.raises(UsageError, match="asks for"):
        refuse_other_trainers("cuda")


def test_what_a_launcher_always_sets_is_no_remark(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unused_settings() == []
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    assert unused_settings() == []
    refuse_other_trainers("cpu")


def test_settings_are_said_not_to_be_used_and_change_nothing(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    config = small(checkpoint, text, tmp_path / "plain")
    monkeypatch.setattr("factorctl.pipeline.finetune.run.draw_training", lambda run, *_: (run / "training.png").touch())
    finetune(config, SilentProgress())
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    progress = SilentProgress()
    finetune(FinetuneConfig(**{**vars(config), "out": tmp_path / "set"}), progress)
    assert progress.notes[1:4] == [
        "accelerate's mixed_precision fp16 is not used: --precision chooses it",
        "accelerate's gradient_accumulation_steps 4 is not used: --batch-tokens and --micro-batch give a step's rounds",
        "accelerate's dynamo_backend INDUCTOR is not used: --compile compiles the layers",
    ]
    assert directory_bytes(tmp_path / "set") == directory_bytes(tmp_path / "plain")


def test_neutral_values_keep_accelerate_from_acting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    with patch_environment(**NEUTRAL):
        accelerator = Accelerator(cpu=True, mixed_precision="no")
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.state.dynamo_plugin.backend == "NO"
    assert os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "4"


def small(checkpoint: Path, text: Path, out: Path) -> FinetuneConfig:
    return FinetuneConfig(
        checkpoint=checkpoint, data=str(text), block_length=32, batch_tokens=64, tokens=128, heldout_tokens=64,
        device="cpu", out=out,
    )  # fmt: skip


def an_earlier_run(**facts: object) -> None:
    """What a run on another device leaves behind in this process."""
    Accelerator(cpu=True)
    for state in (PartialState, AcceleratorState):
        state._shared_state.update(facts)


def test_a_run_on_another_device_may_have_gone_before(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    plain = finetune(small(checkpoint, text, tmp_path / "first"), SilentProgress())
    an_earlier_run(device=torch.device("cuda"))
    after = finetune(small(checkpoint, text, tmp_path / "after"), SilentProgress())
    assert PartialState().device.type == "cpu"
    assert after.losses == plain.losses


def test_the_state_of_another_run_on_the_same_device_is_kept(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    an_earlier_run(mark="kept")
    make_accelerator(plan_finetune(small(checkpoint, text, tmp_path / "out"), SilentProgress()))
    assert PartialState._shared_state["mark"] == "kept"


def test_processes_that_were_joined_are_never_parted(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    plan = plan_finetune(small(checkpoint, text, tmp_path / "out"), SilentProgress())
    an_earlier_run(device=torch.device("cuda"), distributed_type=DistributedType.MULTI_GPU)
    with pytest.raises(ValueError, match="already been initialized"):
        make_accelerator(plan)
