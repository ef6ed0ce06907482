"""What to type after an export: a step that works with what was written, and nothing that only looks near."""

from __future__ import annotations

import shlex
from pathlib import Path

from factorctl.exporting.forms import Form
from factorctl.exporting.gguf.file import GGUF_NAME

LIMITS = "more engines and their limits: docs/serve.md"


def next_steps(out: Path, form: Form, *, has_tokenizer: bool) -> list[str]:
    """Commands or Python for the export in `out`, the first to try first; the last line says where more stands."""
    if form.container == "gguf":
        model, modelfile = shlex.quote(str(out / GGUF_NAME)), shlex.quote(str(out / "Modelfile"))
        return [f"llama-cli -m {model}", f"ollama create NAME -f {modelfile}", LIMITS]
    if form.quantised_experts:
        return [_in_python("import factorctl", f"factorctl.load({str(out)!r})"), LIMITS]
    if "quantization_config" in form.config or not has_tokenizer:
        loading = f"AutoModelForCausalLM.from_pretrained({str(out)!r})"
        return [_in_python("from transformers import AutoModelForCausalLM", loading), LIMITS]
    return [f"vllm serve {shlex.quote(str(out))}", LIMITS]


def _in_python(imported: str, called: str) -> str:
    return f"in Python: {imported}; model = {called}"
