"""What an export says to type next, for every kind of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from factorctl.exporting.card import next_steps
from factorctl.exporting.check.comparison import Fidelity
from factorctl.exporting.forms import Form


def form(**changes: Any) -> Form:
    layout: Any = None
    plain: dict[str, Any] = {
        "container": "safetensors",
        "architecture": "MixtralForCausalLM",
        "layout": layout,
        "config": {},
        "dtype": "bfloat16",
        "top_k": 2,
        "fidelity": Fidelity.EXACT,
    }
    return Form(**{**plain, **changes})


QUANTISED = {"config": {"quantization_config": {}}}


@pytest.mark.parametrize(
    ("changes", "has_tokenizer", "expected"),
    [
        ({}, True, "vllm serve 'my runs/x'"),
        ({}, False, "in Python: from transformers import AutoModelForCausalLM; model = "
                    "AutoModelForCausalLM.from_pretrained('my runs/x')"),
        (QUANTISED, True, "in Python: from transformers import AutoModelForCausalLM; model = "
                          "AutoModelForCausalLM.from_pretrained('my runs/x')"),
        ({**QUANTISED, "quantised_experts": "int8"}, True, "in Python: import factorctl; model = "
                                                          "factorctl.load('my runs/x')"),
        ({"container": "gguf"}, True, "llama-cli -m 'my runs/x/model.gguf'"),
    ],
)  # fmt: skip
def test_the_first_step_works(changes: dict[str, Any], has_tokenizer: bool, expected: str) -> None:
    steps = next_steps(Path("my runs/x"), form(**changes), has_tokenizer=has_tokenizer)
    assert steps[0] == expected
    assert steps[-1] == "more engines and their limits: docs/serve.md"
