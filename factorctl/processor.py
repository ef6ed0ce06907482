"""What Linux tells of the processor, and what Python knows where it does not."""

from __future__ import annotations

import functools
import platform
from pathlib import Path


def processor_name() -> str:
    """The processor's marketing name."""
    names = _described("model name")
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


@functools.cache
def instruction_sets() -> str:
    """The processor and what it can do: what a compiler for this very machine looks at."""
    described = sorted(set(_described("model name", "flags", "Features", "CPU part"))) or [platform.processor()]
    return "\n".join([platform.machine(), *described])


@functools.cache
def multiplies_tiles() -> bool:
    """Whether the processor has AMX for bfloat16, which oneDNN uses and factorctl's own kernel does not."""
    return "amx_bf16" in instruction_sets().split()


def _described(*fields: str) -> list[str]:
    """Lines of /proc/cpuinfo; none where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [line for line in lines if line.startswith(fields)]
