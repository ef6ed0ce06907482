"""Asking llama.cpp, in a process of its own, what a GGUF file computes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from factorctl.errors import FactorctlError, UsageError
from factorctl.exporting.check import llama_cpp_process

TOP = 64
"""Candidates that are compared per position."""
Successors = list[list[tuple[int, float]]]
"""Per position the likeliest next tokens: (id, log-probability)."""


@dataclass(frozen=True)
class LlamaAnswer:
    """What llama.cpp made of a GGUF file."""

    successors: list[Successors]
    tokens: list[list[int]]
    """Each text as llama.cpp tokenises it."""
    fragments: list[list[int]]
    """Each fragment, without BOS and EOS."""
    ending: list[bool]
    """Whether generation stops at each of `ends`."""
    continuations: list[list[int]]


class LlamaCppError(FactorctlError):
    """llama.cpp did not load or run the export: nothing may be published."""


def has_llama_cpp() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


def require_llama_cpp() -> None:
    """Raises:
    UsageError: xllamacpp is not installed.
    """
    if not has_llama_cpp():
        raise UsageError("llama.cpp is asked through the package xllamacpp, which is missing", "pip install xllamacpp")


def llama_cpp_name() -> str:
    return f"llama.cpp (xllamacpp {version('xllamacpp')})"


def ask_llama_cpp(
    gguf: Path,
    sequences: Sequence[Sequence[int]],
    *,
    vocab_size: int,
    texts: Sequence[str] = (),
    fragments: Sequence[str] = (),
    ends: Sequence[int] = (),
    prompts: Sequence[Sequence[int]] = (),
    new_tokens: int = 0,
) -> LlamaAnswer:
    """Load `gguf` on the CPU and run it.

    Raises:
        UsageError: xllamacpp is not installed.
        LlamaCppError: llama.cpp does not take the file.
    """
    require_llama_cpp()
    with tempfile.TemporaryDirectory(prefix="factorctl-export-") as scratch:
        request, answer = Path(scratch) / "request.json", Path(scratch) / "answer.json"
        asked = {
            "gguf": str(gguf.resolve()),
            "sequences": [list(ids) for ids in sequences],
            "texts": list(texts),
            "fragments": list(fragments),
            "ends": list(ends),
            "vocab_size": vocab_size,
            "top": min(TOP, vocab_size),
            "prompts": [list(ids) for ids in prompts],
            "new_tokens": new_tokens,
            "threads": torch.get_num_threads(),
            "answer": str(answer),
        }
        request.write_text(json.dumps(asked))
        finished = subprocess.run(
            [sys.executable, "-I", str(Path(llama_cpp_process.__file__).resolve()), str(request)],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if finished.returncode or not answer.is_file():
            raise LlamaCppError(
                f"llama.cpp does not take the file: {telling_line(finished.stderr)}", "nothing was published"
            )
        found = json.loads(answer.read_text())
    successors = [[[(int(i), float(p)) for i, p in step] for step in steps] for steps in found["successors"]]
    return LlamaAnswer(successors, found["tokens"], found["fragments"], found["ending"], found["continuations"])


def telling_line(log: str) -> str:
    """The line of llama.cpp's log that says what was wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()]
    return (telling or lines or ["no message"])[0][:300]
