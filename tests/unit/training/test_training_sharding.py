"""What is spread over processes, what is refused, and what memory it leaves to expect."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor, Shard

from factorctl.config.finetune import FinetuneConfig
from factorctl.errors import UsageError
from factorctl.pipeline.finetune.plan import FinetunePlan, plan_finetune
from factorctl.pipeline.finetune.run import memory_statement
from factorctl.progress import SilentProgress
from factorctl.training.sharding import (
    _even_dimension,
    all_gathered,
    placed_like,
    process_mesh,
    shard,
    sharding_asked_for,
)

ASKED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def launched(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one: everything that several do, but for talking."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("shape", "processes", "dimension"), [((4, 6, 8), 2, 0), ((4, 6, 8), 3, 1), ((4, 6, 8), 8, 2), ((3, 5), 2, 0)]
)
def test_the_first_even_dimension_is_cut(shape: tuple[int, ...], processes: int, dimension: int) -> None:
    assert _even_dimension(processes)(nn.Parameter(torch.empty(shape))) == Shard(dimension)


@pytest.mark.usefixtures("alone")
def test_integers_stay_whole_and_values_come_back() -> None:
    module = nn.Linear(4, 6)
    values = module.weight.detach().clone()
    module.quantised = nn.Parameter(torch.arange(3, dtype=torch.uint8), requires_grad=False)
    shard(module, process_mesh(torch.device("cpu"), 1))
    spread = {name for name, parameter in module.named_parameters() if isinstance(parameter, DTensor)}
    assert spread == {"weight", "bias"}
    assert torch.equal(all_gathered(module.weight.detach()), values)
    assert torch.equal(all_gathered(placed_like(2 * values, module.weight)), 2 * values)
    assert type(placed_like(torch.zeros(3), module.weight)) is torch.Tensor, "a quantisation map has another shape"


def test_sharding_is_asked_for_through_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not sharding_asked_for()
    launched(monkeypatch, **ASKED, FSDP_OFFLOAD_PARAMS="false", FSDP_RESHARD_AFTER_FORWARD="true")
    assert sharding_asked_for()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"FSDP_VERSION": "1"},
            "FSDP2 alone\nHint: accelerate launch --use_fsdp --fsdp_version 2",
        ),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "does not follow accelerate's --fsdp_offload_params true"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "Hint: use factorctl's own --gradient-checkpointing"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, "does not follow accelerate's --fsdp_reshard_after_forward false"),
    ],
)
def test_what_is_not_followed_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    launched(monkeypatch, **(ASKED | variables))
    with pytest.raises(UsageError) as refused:
        sharding_asked_for()
    assert message in str(refused.value)


def plan(checkpoint: Path, **options: object) -> FinetunePlan:
    sizes = {
        "block_length": 32,
        "batch_tokens": 256,
        "micro_batch": 1,
        "device": "cpu",
        "out": checkpoint.with_name("tuned"),
    }
    return plan_finetune(
        FinetuneConfig(tokens=1024, checkpoint=checkpoint, data="self", **sizes, **options), SilentProgress()
    )


def test_the_expected_memory_is_a_part_of_all_and_two_layers(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = plan(checkpoint).memory
    launched(monkeypatch, **ASKED, WORLD_SIZE="4")
    shared = plan(checkpoint)
    assert shared.sharded
    for name in ("frozen weights", "trained weights", "gradients", "optimizer", "teacher"):
        assert shared.memory[name] == alone[name] / 4
    for name in ("process", "activations", "logits"):
        assert shared.memory[name] == alone[name]
    ffn, attention, rest = 48 * 32 * 3, 32 * 32 * 2 + 16 * 32 * 2 + 2 * 32, 40 * 32 * 2 + 32
    a_layer = 4 * (2 * ffn + 4 * 32 + attention)  # student, teacher, router
    assert shared.memory["put together"] == 2 * a_layer + 4 * (ffn + 4 * 32) + 4 * rest
    assert "in each of 4 processes that share the model: process" in memory_statement(shared)
    assert "put together" not in alone


def test_eight_bit_adamw_and_sharding_are_refused_together(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, **ASKED, WORLD_SIZE="2")
    with pytest.raises(UsageError, match="--optimizer adamw-8bit does not work on a sharded model"):
        plan(checkpoint, optimizer="adamw-8bit")
    launched(monkeypatch, WORLD_SIZE="1")
    assert not plan(checkpoint, optimizer="adamw-8bit").sharded, "one process has nobody to share with"
