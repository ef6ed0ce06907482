"""`factorctl doctor` and `plugins`: what this machine offers, and whose strategies are installed."""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from factorctl import __version__
from factorctl.checkpoint.aliases import ALIASES
from factorctl.ffn.kernel.cpu import reason_without
from factorctl.files.cache import cache_directory
from factorctl.memory import available_memory
from factorctl.partitions import StrategyInfo, available
from factorctl.pipeline.common.provenance import library_versions
from factorctl.processor import has_fast_bfloat16, processor_name, usable_cores


@dataclass(frozen=True)
class Diagnosis:
    """What this machine has."""

    factorctl: str
    python: str
    platform: str
    libraries: dict[str, str]
    cpu: str
    cores: int
    memory_bytes: int
    memory_available_bytes: int
    disk_free_bytes: int
    cuda_devices: list[str]
    bf16_on_cpu: bool
    no_kernel: str | None
    """Why the compiled CPU kernel does not run; None where it does."""
    hub: str
    cache: str


def diagnose(workspace: Path) -> Diagnosis:
    """Versions, devices, free disk and memory, and whether the hub answers."""
    existing = next(path for path in (workspace.absolute(), *workspace.absolute().parents) if path.exists())
    return Diagnosis(
        factorctl=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        libraries=library_versions(),
        cpu=processor_name(),
        cores=usable_cores(),
        memory_bytes=psutil.virtual_memory().total,
        memory_available_bytes=available_memory(),
        disk_free_bytes=shutil.disk_usage(existing).free,
        cuda_devices=[torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        bf16_on_cpu=has_fast_bfloat16(),
        no_kernel=reason_without(),
        hub=_hub_state(),
        cache=str(cache_directory()),
    )


def _hub_state() -> str:
    """'reachable', or why not."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]  # of httpx or httpx2

    try:
        HfApi().model_info("hf-internal-testing/tiny-random-LlamaForCausalLM", timeout=5)
    except (TransportError, OSError, RuntimeError) as error:
        return f"not reachable ({type(error).__name__}): the model `demo` and local directories work without it"
    return "reachable"


@dataclass(frozen=True)
class Plugins:
    """What can be chosen by name."""

    strategies: list[StrategyInfo]
    aliases: dict[str, str]
    """Short name of a model -> what it stands for."""


def list_plugins() -> Plugins:
    """Every installed strategy, broken ones with their fault, and the model aliases."""
    return Plugins(available(), dict(ALIASES))
