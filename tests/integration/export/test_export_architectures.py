"""`--arch`: what each stock architecture holds is what the native checkpoint computes; padding changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.command_line import cli
from support.exporting import ask_about, export_unchecked, largest_difference, make_gguf_source, make_native
from support.tiny import LLAMA3, make_source

from factorctl.checkpoint.reader import CheckpointReader
from factorctl.config.export import Arch, ExportConfig
from factorctl.exporting.check.stock import StockAnswer
from factorctl.exporting.gguf.tensors import storage_type
from factorctl.exporting.stock import folding
from factorctl.exporting.stock.shards import planned_tensors
from factorctl.pipeline.export.plan import plan_export
from factorctl.progress import SilentProgress

SILENT = SilentProgress()


class Case(NamedTuple):
    """One checkpoint in one architecture."""

    arch: Arch
    family: str
    shared: bool
    top_k: int = 2
    gate: str = "softmax"
    changes: tuple[tuple[str, Any], ...] = ()
    pad: int | None = None
    """`--pad-experts`."""

    def __str__(self) -> str:
        words = [self.arch, self.family, "shared" if self.shared else "routed", f"K{self.top_k}", self.gate]
        return "-".join([*words, *(name for name, _ in self.changes), *(["padded"] if self.pad else [])])


BIASES = (("attention_bias", True),)
SCALED = (("rope_parameters", LLAMA3),)
CASES = [
    Case("granite-moe-shared", "llama", True),
    Case("granite-moe-shared", "llama-tied", False, changes=SCALED),
    Case("granite-moe-hybrid", "llama", False),
    Case("granite-moe-hybrid", "llama", True, changes=SCALED),
    Case("granite-moe-hybrid", "llama", True, changes=BIASES, pad=32),
    Case("granite-moe-hybrid", "qwen2", True),
    Case("granite-moe-hybrid", "phi3", True, 4),
    Case("auto", "llama", False, changes=BIASES),
    Case("qwen2-moe", "llama", True, pad=32),
    Case("qwen2-moe", "llama-tied", False, 1),
    Case("qwen3-moe", "qwen3", True, pad=32),
    Case("mixtral", "mistral", False, pad=32),
    Case("glm4-moe", "llama-tied", True, 4),
    Case("glm4-moe", "llama", False, 4, pad=32),
    Case("glm4-moe", "llama", True, 1, changes=SCALED),
    Case("glm4-moe", "qwen2", True, 1, "hard"),
    Case("glm4-moe", "qwen3", True, 1),
]


class Exported(NamedTuple):
    native: Path
    path: Path
    answer: StockAnswer

    @property
    def config(self) -> dict[str, Any]:
        return dict(json.loads((self.path / "config.json").read_text()))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> dict[str, Exported]:
    """All of them made and exported, then loaded by one stock process."""
    natives: dict[str, Path] = {}
    paths: dict[str, Path] = {}
    for index, case in enumerate(CASES):
        directory = tmp_path_factory.mktemp(f"case{index}")
        source = make_source(directory / "dense", case.family, **dict(case.changes))
        options = {"top_k": case.top_k, "gate": case.gate}
        natives[str(case)] = make_native(directory, "case", text_file, shared=case.shared, source=source, **options)
        paths[str(case)] = directory / "hf"
        padding = {} if case.pad is None else {"pad_experts": case.pad}
        export_unchecked(ExportConfig(checkpoint=natives[str(case)], out=paths[str(case)], arch=case.arch, **padding))
    answers = ask_about(paths)
    return {name: Exported(natives[name], paths[name], answers[name]) for name in paths}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stock_transformers_computes_the_same(case: Case, exported: dict[str, Exported]) -> None:
    made = exported[str(case)]
    classes = {"auto": "GraniteMoeHybridForCausalLM", "glm4-moe": "Glm4MoeForCausalLM"}
    spelled = case.arch.title().replace("-", "") + "ForCausalLM"
    assert made.answer.class_name == classes.get(case.arch, spelled)
    assert largest_difference(made.native, made.answer) < 1e-4


@pytest.mark.parametrize("case", [case for case in CASES if case.pad], ids=str)
def test_padded_sizes_are_those_of_the_tensors(case: Case, exported: dict[str, Exported]) -> None:
    config = exported[str(case)].config
    sizes = [config.get("moe_intermediate_size", config["intermediate_size"])]
    sizes += [config[key] for key in ("shared_intermediate_size", "shared_expert_intermediate_size") if key in config]
    assert all(size % 32 == 0 for size in sizes)
    reader = CheckpointReader(exported[str(case)].path)
    (down, *_) = (n for n in reader.entries if "experts.0." in n or ".output_linear" in n)
    assert any(size % 32 == 0 for size in reader.entry(down).shape)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_config_switches_a_balance_loss_on(case: Case, exported: dict[str, Exported]) -> None:
    """trl trains with one wherever the coefficient is not zero, and looks for `num_experts` first."""
    config = exported[str(case)].config
    assert config["router_aux_loss_coef"] == 0.0
    assert config["output_router_logits"] is False
    if case.arch not in ("mixtral",):
        assert config["num_experts"] == 4


def test_the_hybrid_has_attention_layers_alone(exported: dict[str, Exported]) -> None:
    config = exported["granite-moe-hybrid-llama-shared-K2-softmax-rope_parameters"].config
    assert config["layer_types"] == ["attention", "attention"]
    assert config["position_embedding_type"] == "rope"
    assert config["mamba_n_heads"] * config["mamba_d_head"] == config["mamba_expand"] * config["hidden_size"]


def test_experts_of_an_awkward_size_are_padded_by_themselves(tmp_path: Path, text_file: Path) -> None:
    """48 neurons make 8 experts of 6: rows of 24 bytes, where `grouped_mm` wants a multiple of 16."""
    native = make_native(tmp_path, "llama", text_file, num_experts=8)
    outcome = cli("export", native, "--out", tmp_path / "out", "--format", "json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["max_logit_error"] < 1e-4
    (note,) = (note for note in outcome.json["notes"] if "neurons of zeros" in note)
    assert "fill up each expert's 6 to 32" in note
    card = (tmp_path / "out" / "README.md").read_text()
    assert note[1:] in card  # the card begins it with a capital
    assert "eager" not in card
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == 32


def test_experts_that_are_not_padded_are_loaded_with_another_kernel(tmp_path: Path, text_file: Path) -> None:
    native = make_native(tmp_path, "llama", text_file, num_experts=8)
    outcome = cli("export", native, "--out", tmp_path / "out", "--pad-experts", "1", "--format", "json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["max_logit_error"] < 1e-4
    assert any("grouped_mm" in note for note in outcome.json["notes"])
    snippet = (tmp_path / "out" / "README.md").read_text().partition("```python")[2].partition("```")[0]
    assert 'from_pretrained("PATH", experts_implementation="eager")' in snippet


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arch", "mixtral", "--to", "gguf"], "--arch mixtral has no meaning with --to gguf"),
        (["--arch", "mixtral", "--to", "dense"], "--arch mixtral has no meaning with --to dense"),
        (["--pad-experts", "32", "--to", "dense"], "--pad-experts 32 has no meaning with --to dense"),
        (["--pad-experts", "0"], "--pad-experts 0 is no positive number"),
        (["--pad-experts", "some"], "--pad-experts some is neither auto nor a number"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    options: list[str], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    outcome = cli("export", checkpoint, "--out", tmp_path / "out", *options)
    assert outcome.code == 2
    assert message in outcome.message


def test_what_an_engine_does_wrongly_is_said_in_summary_and_card(tmp_path: Path, text_file: Path) -> None:
    source = make_source(tmp_path / "dense", "llama", rope_parameters=LLAMA3)
    native = make_native(tmp_path, "llama", text_file, source=source)
    outcome = cli("export", native, "--out", tmp_path / "out", "--format", "json")
    assert outcome.code == 0, outcome.stderr
    (mlx,) = (note for note in outcome.json["notes"] if note.startswith("mlx-lm"))
    (sglang,) = (note for note in outcome.json["notes"] if note.startswith("SGLang"))
    assert "takes no notice of rope_scaling; no such form is right there; llama.cpp runs --to gguf" in mlx
    assert "takes no notice of rope_scaling; --arch granite-moe-hybrid is right there" in sglang
    card = (tmp_path / "out" / "README.md").read_text()
    assert mlx[1:] in card
    assert sglang in card
    assert mlx[:20] in outcome.stderr


def test_block_wise_types_of_gguf_get_whole_blocks(tmp_path: Path, text_file: Path) -> None:
    """8 experts of 6 neurons, a quarter of a block: unpadded, every `ffn_down` would stay f16."""
    source = make_gguf_source(tmp_path / "dense", "llama")
    native = make_native(tmp_path, "llama", text_file, source=source, num_experts=8)
    outcome = cli("export", native, "--to", "gguf", "--quant", "q8_0", "--out", tmp_path / "out", "--dry-run")
    assert outcome.code == 0, outcome.stderr
    assert "fill up each expert's 6 to 32" in " ".join(outcome.stderr.split())
    job = plan_export(ExportConfig(checkpoint=native, target="gguf", quant="q8_0", out=tmp_path / "out"), SILENT).job
    kinds = {t.name: storage_type(t.name, t.shape, "q8_0").name for t in planned_tensors(job.form.layout, job.reader)}
    assert kinds["blk.0.ffn_down_exps.weight"] == "Q8_0"


def test_plain_types_of_gguf_are_left_as_they_are(tmp_path: Path, text_file: Path) -> None:
    source = make_gguf_source(tmp_path / "dense", "llama")
    native = make_native(tmp_path, "llama", text_file, source=source, num_experts=8)
    job = plan_export(ExportConfig(checkpoint=native, target="gguf", quant="f16", out=tmp_path / "out"), SILENT).job
    assert job.form.sizes == job.form.unpadded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "gguf", "--quant", "q8_0"], "the padding in tensor blk.0.ffn_up_exps.weight is not zero"),
        (["--pad-experts", "16"], "does not compute what the native model computes"),
    ],
)
def test_padding_that_is_not_zero_is_refused(
    options: list[str], message: str, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_ones(tensor: torch.Tensor, size: int, *, dim: int) -> torch.Tensor:
        missing = size - tensor.shape[dim]
        return torch.cat([tensor, torch.ones_like(tensor.narrow(dim, 0, 1)).repeat_interleave(missing, dim)], dim)

    monkeypatch.setattr(folding, "padded", with_ones)
    source = make_gguf_source(tmp_path / "dense", "llama")
    native = make_native(tmp_path, "llama", text_file, source=source)
    outcome = cli("export", native, "--out", tmp_path / "out", *options)
    assert outcome.code == 1
    assert message in outcome.message
    assert not (tmp_path / "out").exists()
