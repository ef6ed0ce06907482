"""llama.cpp's own quantiser, which makes the mixed types: Q4_K_M and its kin give each tensor a type of its own.

It comes with the package cyllama, whose wheels carry llama.cpp, or is the program `llama-quantize` of an installed
llama.cpp. The package goes first, since its version is known.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from factorctl.errors import FactorctlError, UsageError
from factorctl.exporting.check.llama_cpp import telling_line
from factorctl.exporting.gguf import llama_quantizer_process

PACKAGE, PROGRAM = "cyllama", "llama-quantize"

_Q = GGMLQuantizationType
MIXED = {
    "q6_k": _Q.Q6_K,
    "q5_k_m": _Q.Q5_K,
    "q5_k_s": _Q.Q5_K,
    "q4_k_m": _Q.Q4_K,
    "q4_k_s": _Q.Q4_K,
    "q3_k_l": _Q.Q3_K,
    "q3_k_m": _Q.Q3_K,
    "q3_k_s": _Q.Q3_K,
    "q2_k": _Q.Q2_K,
}
"""Mixed types that need no importance matrix -> what most tensors become."""
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
"""As llama-quantize reads them."""
_FALLBACK = {_Q.Q2_K: _Q.Q4_0, _Q.Q3_K: _Q.Q4_0, _Q.Q4_K: _Q.Q5_0, _Q.Q5_K: _Q.Q5_1, _Q.Q6_K: _Q.Q8_0}
"""Where rows are no multiple of a K-quant's 256 weights."""


class QuantizerError(FactorctlError):
    """llama.cpp's quantiser failed: nothing may be published."""


@dataclass(frozen=True)
class Quantizer:
    """A way to run llama.cpp's quantiser."""

    name: str
    """For people: what it is and of which version."""
    command: tuple[str, ...]
    by_number: bool
    """Whether the type is named by llama.cpp's number for it."""

    def quantise(self, plain: Path, out: Path, quant: str) -> None:
        """Write `out`: the GGUF file `plain` with its tensors in the mixed type `quant`.

        Raises:
            QuantizerError: with the line of llama.cpp's log that says what was wrong.
        """
        kind = str(int(file_type(quant))) if self.by_number else quant.upper()
        finished = subprocess.run(
            [*self.command, str(plain.resolve()), str(out.resolve()), kind, str(torch.get_num_threads())],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if finished.returncode or not out.is_file():
            said = telling_line(finished.stderr or finished.stdout)
            raise QuantizerError(f"{self.name} did not make {quant}: {said}", "nothing was published")


def file_type(quant: str) -> LlamaFileType:
    """llama.cpp's number for a storage type; Q6_K alone is no mixture and has no `M`."""
    return LlamaFileType.ALL_F32 if quant == "f32" else LlamaFileType[f"MOSTLY_{quant.upper()}"]


def find_quantizer() -> Quantizer | None:
    """The quantiser of this environment, else that on PATH."""
    if importlib.util.find_spec(PACKAGE) is not None:
        script = str(Path(llama_quantizer_process.__file__).resolve())
        return Quantizer(f"llama.cpp ({PACKAGE} {version(PACKAGE)})", (sys.executable, "-I", script), by_number=True)
    program = shutil.which(PROGRAM)
    return None if program is None else Quantizer(f"llama.cpp ({program})", (program,), by_number=False)


def require_quantizer(quant: str) -> Quantizer:
    """Raises:
    UsageError: there is none here, with two ways to get one.
    """
    found = find_quantizer()
    if found is None:
        raise UsageError(
            f"--quant {quant} is made by llama.cpp's own quantiser, and neither the package {PACKAGE} nor the program "
            f"{PROGRAM} is here",
            f"pip install {PACKAGE}; or export with --quant f16 and, where llama.cpp is, run: "
            f"{PROGRAM} model.gguf model-{quant.upper()}.gguf {quant.upper()}",
        )
    return found


def likely_type(name: str, shape: Sequence[int], quant: str) -> GGMLQuantizationType:
    """What llama.cpp makes of most tensors of this kind; which few get more bits it decides by itself."""
    if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):
        return _Q.F32
    kind = _Q.Q6_K if name in ("token_embd.weight", "output.weight") else MIXED[quant]
    if not fits(shape, kind):
        kind = _FALLBACK[kind]
    return kind if fits(shape, kind) else _Q.F16


def fits(shape: Sequence[int], kind: GGMLQuantizationType) -> bool:
    """Whether a row is a whole number of the type's blocks."""
    return bool(shape[-1] % GGML_QUANT_SIZES[kind][0] == 0)
