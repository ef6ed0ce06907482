"""Libraries draw no bars and say nothing of kernels that they would fetch; their warnings come through."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
from factorctl.quiet import quieten_libraries
quieten_libraries()
import logging, warnings
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging
for _ in tqdm(range(3), desc="Converting and de-quantizing GGUF tensors..."): pass
for _ in transformers_logging.tqdm(range(3), desc="Loading weights"): pass
logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", "offline")
logger.warning("something is wrong with %s", "these weights")
transformers_logging.get_logger("transformers.modeling_utils").error("a weight is missing")
warnings.warn("this will hurt", UserWarning)
"""


def said(**variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TQDM", "HF_", "TRANSF"))}
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=True).stderr


def test_notices_are_quiet_and_warnings_are_not() -> None:
    stderr = said()
    assert "Loading weights" not in stderr
    assert "GGUF tensors" not in stderr
    assert "gemm_4bit_forward" not in stderr
    assert "something is wrong with these weights" in stderr
    assert "a weight is missing" in stderr
    assert "this will hurt" in stderr


def test_everything_is_shown_to_who_looks_for_faults() -> None:
    stderr = said(FACTORCTL_DEBUG="1")
    assert "Loading weights" in stderr
    assert "gemm_4bit_forward" in stderr
