"""How much memory may be taken: the machine's, or what a container's limit leaves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from factorctl.memory import available_memory, peak_memory


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A control group on a machine with 1000 bytes left."""
    memory = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr("factorctl.memory.psutil.virtual_memory", lambda: memory)
    return tmp_path


def limited(group: Path, limit: str, used: int, droppable: int) -> int:
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {droppable}\nactive_file 7\n")
    return available_memory(group)


def test_without_a_group_the_machine_decides(group: Path) -> None:
    assert available_memory(group) == 1000


@pytest.mark.parametrize(
    ("limit", "used", "droppable", "available"),
    [("max", 10, 0, 1000), ("600", 500, 0, 100), ("600", 500, 50, 150), ("600", 700, 0, 0), ("5000", 500, 0, 1000)],
)
def test_the_group_decides_where_it_leaves_less(
    group: Path, limit: str, used: int, droppable: int, available: int
) -> None:
    assert limited(group, limit, used, droppable) == available


def resident(monkeypatch: pytest.MonkeyPatch, platform: str) -> int:
    usage = SimpleNamespace(ru_maxrss=300_000)
    monkeypatch.setattr("factorctl.memory.sys.platform", platform)
    monkeypatch.setattr("factorctl.memory.resource.getrusage", lambda _: usage)
    return peak_memory()


def test_a_resident_size_is_in_bytes_on_every_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """getrusage(2): in kilobytes on Linux, in bytes on macOS."""
    assert resident(monkeypatch, "linux") == 300_000 * 1024
    assert resident(monkeypatch, "darwin") == 300_000


def test_the_peak_on_a_cpu_is_the_resident_size() -> None:
    assert peak_memory() <= peak_memory(torch.device("cpu")) <= peak_memory()
