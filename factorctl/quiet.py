"""The one place that keeps bars and notices of libraries out of our own output, and lets their warnings through.

FACTORCTL_DEBUG shows everything. Nothing here imports a library: what they read at import is set before.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings

QUIET_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
}
"""What transformers, tokenizers, huggingface_hub and tqdm look at before they draw "Loading weights", "Writing model
shards", "Converting and de-quantizing GGUF tensors". A user's own setting wins."""
_NOTICES = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
}
"""Logger -> beginning of what it says although nothing is wrong: a faster kernel that it would fetch from the hub."""


def quieten_libraries() -> None:
    """For a process of the command line, before anything heavy is imported."""
    if os.environ.get("FACTORCTL_DEBUG"):
        return
    for variable, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    for logger, beginning in _NOTICES.items():
        logging.getLogger(logger).addFilter(functools.partial(_passes, beginning))


def _passes(beginning: str, record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(beginning)
