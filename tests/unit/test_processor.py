"""What is told of the processor, on Linux and where there is no /proc/cpuinfo."""

from __future__ import annotations

import os
import platform

import pytest
import torch

from factorctl import processor


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of /proc/cpuinfo, to be filled in; nothing is remembered of the real ones."""
    lines: list[str] = []
    monkeypatch.setattr(processor, "_described", lambda *fields: [line for line in lines if line.startswith(fields)])
    for name in ("instruction_sets", "multiplies_tiles"):
        monkeypatch.setattr(processor, name, getattr(processor, name).__wrapped__)
    return lines


def test_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert processor.usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert processor.usable_cores() == 8


@pytest.mark.parametrize(
    ("flags", "tiles", "bfloat16"),
    [("fma avx2", False, False), ("avx512_bf16", False, True), ("amx_bf16", True, True), ("", False, False)],
)
def test_what_the_processor_multiplies(described: list[str], flags: str, tiles: bool, bfloat16: bool) -> None:
    described += ["model name\t: Some CPU @ 2 GHz", f"flags\t: sse {flags}"]
    assert processor.processor_name() == "Some CPU @ 2 GHz"
    assert processor.multiplies_tiles() is tiles
    assert processor.has_fast_bfloat16() is bfloat16


def test_without_a_description_python_names_it(described: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert processor.processor_name() == "arm64"
    assert not processor.has_fast_bfloat16()


def test_a_gpu_is_asked_itself(described: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    described.append("flags\t: amx_bf16")
    for answer in (False, True):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda answer=answer, **_: answer)
        assert processor.has_fast_bfloat16(torch.device("cuda")) is answer
    assert processor.has_fast_bfloat16(torch.device("cpu"))
