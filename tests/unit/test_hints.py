"""A hint names a step that exists and works where it is named."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from conftest import DenseSource
from support.tiny import calibrated, factorize_quietly, weights_only

from factorctl.cli.app import app
from factorctl.config.shape import factor_shape
from factorctl.errors import ResourceError, UsageError
from factorctl.pipeline.factorize import plan as factorize_plan
from factorctl.pipeline.factorize.plan import plan_factorize
from factorctl.progress import SilentProgress

ROOT = Path(__file__).parents[2] / "factorctl"
ERRORS = {"FactorctlError", "UsageError", "ResourceError", "IntegrityError"}
FOREIGN = {"--use", "--fsdp", "--merge", "--help"}
"""Options of accelerate and llama.cpp."""


def hints() -> Iterator[tuple[str, str]]:
    """(where, text) of every hint that is written out where its error is raised."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ERRORS:
                said = [*node.args[1:2], *(word.value for word in node.keywords if word.arg == "hint")]
                for hint in said:
                    strings = [
                        part.value for part in ast.walk(hint)
                        if isinstance(part, ast.Constant) and isinstance(part.value, str)
                    ]  # fmt: skip
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", " ".join(strings)


def test_every_option_and_command_that_a_hint_names_exists() -> None:
    group = typer.main.get_command(app)
    commands = group.commands  # type: ignore[attr-defined]
    params = [option for command in commands.values() for option in command.params]
    options = {name for option in params for name in (*option.opts, *option.secondary_opts)}
    found = list(hints())
    assert len(found) > 150
    for where, hint in found:
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*", hint):
            assert option in options | FOREIGN, f"{where} names {option}"
        for command in re.findall(r"`factorctl ([a-z]+)", hint):
            assert command in commands, f"{where} names factorctl {command}"


def test_a_source_without_tokenizer_can_be_factorized_as_the_hint_says(
    dense_source: DenseSource, text_file: Path, tmp_path: Path
) -> None:
    source = tmp_path / "bare"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        (source / name).symlink_to(dense_source() / name)
    with pytest.raises(UsageError) as refused:
        factorize_quietly(calibrated(source, tmp_path / "o", text_file))
    assert refused.value.hint is not None
    assert "--experts N --router random, without --refit and --shared-fraction" in refused.value.hint
    factorize_quietly(weights_only(source, tmp_path / "o", strategy=None))


def test_what_the_gpu_cannot_hold(
    dense_source: DenseSource, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokens, and what is computed for them; the model's own tensors stay with the processor."""
    config = calibrated(dense_source(), tmp_path / "o", text_file, calibration_tokens=64_000)
    monkeypatch.setattr(factorize_plan, "torch_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(factorize_plan, "free_memory", lambda _: 10**6)
    with pytest.raises(ResourceError) as refused:
        plan_factorize(config, SilentProgress())
    assert refused.value.message.endswith("GB of memory are needed on the GPU; 0.0 GB are available")
    assert refused.value.hint is not None
    assert refused.value.hint.startswith("lower --calibration-tokens, or choose --device cpu, or ")
    monkeypatch.setattr(factorize_plan, "free_memory", lambda _: 10**12)
    assert plan_factorize(config, SilentProgress()).config.calibration_tokens == 64_000
    assert plan_factorize(replace(config, calibration_tokens=None), SilentProgress()).config.calibrated_on == 65_536


@pytest.mark.parametrize(("inner", "hint"), [(48, "try 4 or 6, or --shared-fraction 0.25"), (131, "add --shared")])
def test_a_number_of_experts_that_does_not_divide_fits_with_shared_neurons(inner: int, hint: str) -> None:
    with pytest.raises(UsageError) as refused:
        factor_shape(inner, num_experts=5, top_k=2, shared_fraction=0)
    assert refused.value.hint is not None
    assert refused.value.hint.startswith(hint)
    assert factor_shape(inner, num_experts=5, top_k=2, shared_fraction=0.25).shared_size > 0


@pytest.mark.parametrize(("available", "hint"), [(0, "the largest layer alone"), (10**9, "lower --calibration-tokens")])
def test_what_memory_cannot_hold(
    dense_source: DenseSource,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    available: int,
    hint: str,
) -> None:
    config = calibrated(dense_source(), tmp_path / "o", text_file, calibration_tokens=100_000_000)
    monkeypatch.setattr(factorize_plan, "available_memory", lambda: available)
    with pytest.raises(ResourceError) as refused:
        plan_factorize(config, SilentProgress())
    assert refused.value.hint is not None
    assert hint in refused.value.hint
