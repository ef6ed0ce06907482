"""Every family as a stock mixture of experts: loaded where factorctl cannot be, with the native logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
from support.exporting import ask_about, export_unchecked, largest_difference, make_native
from support.tiny import make_source

from factorctl.config.export import ExportConfig
from factorctl.exporting.check.stock import StockAnswer

FAMILIES = ("llama", "llama-tied", "mistral", "qwen2", "qwen3", "phi3")
ARCHITECTURES = {"qwen2": "Qwen2MoeForCausalLM", "qwen3": "Qwen3MoeForCausalLM"}
NUM_EXPERTS = 4


class Case(NamedTuple):
    """One checkpoint to export."""

    family: str
    shared: bool
    top_k: int
    gate: str = "softmax"

    def __str__(self) -> str:
        return f"{self.family}-{'shared' if self.shared else 'routed'}-K{self.top_k}-{self.gate}"

    @property
    def architecture(self) -> str:
        return ARCHITECTURES.get(self.family, "GraniteMoeHybridForCausalLM" if self.shared else "MixtralForCausalLM")


CASES = [Case(family, shared, k) for family in FAMILIES for shared in (False, True) for k in (1, 2, NUM_EXPERTS)]
CASES += [Case("llama", shared, k, "hard") for shared in (False, True) for k in (1, NUM_EXPERTS)]


class Exported(NamedTuple):
    native: Path
    path: Path
    answer: StockAnswer


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> dict[Case, Exported]:
    """All of them made and exported, then loaded by one stock process."""
    directory = tmp_path_factory.mktemp("export")
    natives: dict[Case, Path] = {}
    for case in CASES:
        source = directory / case.family / str(case.shared) / "dense"
        if not source.exists():
            # Where GraniteMoeHybrid takes over from Mixtral, there is no window to keep.
            window = {"sliding_window": None} if case.family == "mistral" and case.shared else {}
            make_source(source, case.family, **window)
        options = {"top_k": case.top_k, "gate": case.gate}
        natives[case] = make_native(source.parent, case.family, text_file, shared=case.shared, source=source, **options)
    paths = {case: native.with_name(native.name + "-hf") for case, native in natives.items()}
    for case, path in paths.items():
        export_unchecked(ExportConfig(checkpoint=natives[case], out=path))
    answers = ask_about({str(case): path for case, path in paths.items()})
    return {case: Exported(natives[case], paths[case], answers[str(case)]) for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stock_transformers_computes_the_same(case: Case, exported: dict[Case, Exported]) -> None:
    made = exported[case]
    assert made.answer.class_name == case.architecture
    assert largest_difference(made.native, made.answer) < 1e-4
    config = json.loads((made.path / "config.json").read_text())
    assert config["num_experts_per_tok"] == case.top_k
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
