"""`--to bnb-4bit` and `--to bnb-8bit` of routed experts: small on disk and in memory, the stock class when loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import cli
from support.exporting import SEQUENCES, export_unchecked, make_native
from support.tiny import make_source
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

import factorctl
from factorctl.checkpoint.manifest import read_manifest
from factorctl.checkpoint.reader import CheckpointReader
from factorctl.config.export import ExportConfig
from factorctl.errors import IntegrityError, UsageError
from factorctl.exporting.check import bnb_proof
from factorctl.exporting.check.stock import StockAnswer
from factorctl.exporting.stock import bnb as bnb_layout
from factorctl.models.quantised.loading import load_quantised, weight_bytes
from factorctl.models.quantised.storage import is_quantised

pytest.importorskip("bitsandbytes")

SIZES = {"hidden_size": 64, "intermediate_size": 384, "head_dim": 16, "initializer_range": 0.05}
HELD_BYTES = {"bnb-4bit": 0.6, "bnb-8bit": 1.1}
"""Per expert weight: codes and scales."""


class Case(NamedTuple):
    family: str
    shared: bool
    architecture: str

    def __str__(self) -> str:
        return self.architecture


CASES = [
    Case("llama-tied", False, "MixtralForCausalLM"),
    Case("llama", True, "GraniteMoeHybridForCausalLM"),
    Case("qwen2", False, "Qwen2MoeForCausalLM"),
    Case("qwen3", False, "Qwen3MoeForCausalLM"),
    Case("qwen3", True, "Qwen3MoeForCausalLM"),
]
TARGETS = ("bnb-4bit", "bnb-8bit")


class Exported(NamedTuple):
    native: Path
    path: Path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Callable[[Case, str], Exported]:
    """Each export made when first asked for."""
    directory = tmp_path_factory.mktemp("bnb")
    natives: dict[Case, Path] = {}
    made: dict[tuple[Case, str], Exported] = {}

    def export(case: Case, target: str) -> Exported:
        if case not in natives:
            folder = directory / f"{case.family}-{case.shared}"
            source = make_source(folder / "dense", case.family, **SIZES)
            natives[case] = make_native(folder, case.family, text_file, shared=case.shared, source=source)
        if (case, target) not in made:
            path = natives[case].with_name(target)
            export_unchecked(ExportConfig(checkpoint=natives[case], target=target, out=path))  # type: ignore[arg-type]
            made[case, target] = Exported(natives[case], path)
        return made[case, target]

    return export


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_weight_is_the_stock_export_s_to_a_step_and_the_stock_class_computes_with_it(
    case: Case, target: str, exported: Callable[[Case, str], Exported]
) -> None:
    stock = AutoModelForCausalLM.from_pretrained(exported(case, "hf").path, experts_implementation="eager").eval()
    model = factorctl.load(exported(case, target).path)
    assert type(model) is type(stock)
    assert type(model).__name__ == case.architecture
    weights = stock.state_dict()
    for name, weight in weights.items():
        path, _, parameter = name.rpartition(".")
        held = getattr(model.get_submodule(path), parameter).detach()
        assert torch.all((held - weight).abs() <= _largest_step(name, weight, target)), name
        weights[name] = held
    stock.load_state_dict(weights)
    for ids in SEQUENCES:
        with torch.no_grad():
            ours, theirs = (one(torch.tensor([ids])).logits for one in (model, stock))
        assert torch.allclose(ours, theirs, atol=1e-5)


def _largest_step(name: str, weight: torch.Tensor, target: str) -> torch.Tensor:
    """How far rounding may move each weight: half the widest gap of nf4 within its block, half a 127th of its row."""
    if not is_quantised(name):
        return torch.zeros(())
    if target == "bnb-8bit":
        return weight.abs().amax(-1, keepdim=True) / 127 * 0.6  # and the rounding to float16 before
    blocks = weight.flatten().split(64)
    steps = [block.abs().max().expand(len(block)) * (1 - 0.6961928) / 2 for block in blocks]
    return torch.cat(steps).view(weight.shape) * 1.001


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_experts_are_small_in_memory_before_and_after_they_generate(
    case: Case, target: str, exported: Callable[[Case, str], Exported]
) -> None:
    model = factorctl.load(exported(case, target).path)
    before = weight_bytes(model)
    ids = torch.tensor([SEQUENCES[0]])
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4)
    assert text.shape == (1, len(SEQUENCES[0]) + 4)
    assert weight_bytes(model) == before
    assert not parametrize._cache
    for experts in _experts(model):
        weights = experts.gate_up_proj.numel() + experts.down_proj.numel()
        assert weight_bytes(experts) <= HELD_BYTES[target] * weights
        assert not any(parameter.is_floating_point() for parameter in experts.parameters())


def _experts(model: Any) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith(".experts")]


def test_the_plain_loop_over_experts_dequantises_once(exported: Callable[[Case, str], Exported]) -> None:
    model = factorctl.load(exported(CASES[0], "bnb-8bit").path)
    model.set_experts_implementation("eager")
    calls: list[int] = []
    for experts in _experts(model):
        experts.parametrizations.gate_up_proj[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(torch.tensor([SEQUENCES[0]]))
    assert len(calls) == len(_experts(model))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_stock_transformers_refuses_rather_than_run_random_experts(
    case: Case, target: str, exported: Callable[[Case, str], Exported]
) -> None:
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(exported(case, target).path)


NAMES = {
    "bnb-4bit": {
        "mlp.gate.weight": torch.float32,
        "mlp.experts.gate_up_proj": torch.uint8,
        "mlp.experts.gate_up_proj.absmax": torch.float32,
        "mlp.experts.gate_up_proj.quant_map": torch.float32,
        "mlp.experts.gate_up_proj.quant_state.bitsandbytes__nf4": torch.uint8,
        "mlp.experts.down_proj": torch.uint8,
        "mlp.experts.down_proj.absmax": torch.float32,
        "mlp.experts.down_proj.quant_map": torch.float32,
        "mlp.experts.down_proj.quant_state.bitsandbytes__nf4": torch.uint8,
    },
    "bnb-8bit": {
        "mlp.gate.weight": torch.float32,
        "mlp.experts.gate_up_proj": torch.int8,
        "mlp.experts.gate_up_proj.SCB": torch.float32,
        "mlp.experts.down_proj": torch.int8,
        "mlp.experts.down_proj.SCB": torch.float32,
    },
}


@pytest.mark.parametrize("target", TARGETS)
def test_names_and_types_on_disk(target: str, exported: Callable[[Case, str], Exported]) -> None:
    entries = CheckpointReader(exported(CASES[0], target).path).entries
    prefix = "model.layers.1."
    found = {name.removeprefix(prefix): e.dtype for name, e in entries.items() if name.startswith(f"{prefix}mlp.")}
    assert found == NAMES[target]
    assert "model.layers.0.self_attn.q_proj.weight" + (".absmax" if "4" in target else "_format") in entries


def test_the_command_states_size_and_closeness_and_how_to_load_it(
    exported: Callable[[Case, str], Exported], tmp_path: Path
) -> None:
    native, out = exported(CASES[1], "hf").native, tmp_path / "out"
    outcome = cli("export", native, "--to", "bnb-4bit", "--dtype", "bfloat16", "--out", out, "--format", "json")
    assert outcome.code == 0, outcome.stderr
    result = outcome.json
    assert result["architecture"] == "GraniteMoeHybridForCausalLM"
    assert result["dtype"] == "nf4 and bfloat16"
    assert result["engine"].endswith("through factorctl.load, in bfloat16")
    assert 0 < result["kl"] < 1
    assert result["top1_agreement"] > 0.5
    model = factorctl.load(out)
    assert model.dtype == torch.bfloat16
    assert result["memory_bytes"] == weight_bytes(model)
    manifest = read_manifest(out)
    assert manifest.details["quantised_experts"] == "nf4"
    assert manifest.details["memory_bytes"] == result["memory_bytes"]
    assert any("load with factorctl.load" in note for note in result["notes"])
    card = (out / "README.md").read_text()
    for expected in ('model = factorctl.load("PATH")', "MB of memory when loaded", "loaded by `factorctl.load`"):
        assert expected in card
    assert "no custom code" not in card
    refused = cli("export", out, "--out", tmp_path / "again")
    assert refused.code == 2
    assert "load it with factorctl.load" in refused.message


@pytest.mark.parametrize("target", TARGETS)
def test_a_weight_that_strays_is_not_published(
    target: str, exported: Callable[[Case, str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One expert's weights exchanged after quantising: the logits of a mixture need not show it."""
    right = bnb_layout.quantised

    def exchanged(name: str, weight: torch.Tensor, bits: Any) -> dict[str, torch.Tensor]:
        is_one = name == "model.layers.1.mlp.experts.down_proj"
        return right(name, weight.flip(0) if is_one and not weight.is_meta else weight, bits)

    monkeypatch.setattr(bnb_layout, "quantised", exchanged)
    outcome = cli("export", exported(CASES[0], "hf").native, "--to", target, "--out", tmp_path / "out")
    assert outcome.code == 3
    assert "tensor model.layers.1.mlp.experts.down_proj of the export is not what it stands for" in outcome.message
    assert not list(tmp_path.iterdir())


def test_answers_that_part_are_published_with_a_note_and_infinite_ones_are_not(
    exported: Callable[[Case, str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native, factor = exported(CASES[0], "hf").native, 5.0

    def far(jobs: Any) -> list[StockAnswer]:
        rows = [torch.arange(40.0).expand(len(ids), 40) * factor for ids in jobs[0].question.sequences]
        return [StockAnswer("MixtralForCausalLM", rows, 1000)]

    monkeypatch.setattr(bnb_proof, "ask_quantised", far)
    outcome = cli("export", native, "--to", "bnb-4bit", "--out", tmp_path / "out", "--format", "json")
    assert outcome.code == 0, outcome.stderr
    assert any("its routing is unstable" in note for note in outcome.json["notes"])
    assert "its routing is unstable" in (tmp_path / "out" / "README.md").read_text().replace("Every", "every")
    factor = float("nan")
    refused = cli("export", native, "--to", "bnb-4bit", "--out", tmp_path / "nan")
    assert refused.code == 1
    assert "the export does not compute what the native model computes" in refused.message


def test_a_hard_gate_comes_near_through_scaled_routers(tmp_path: Path, text_file: Path) -> None:
    source = make_source(tmp_path / "dense", "llama", **SIZES)
    native = make_native(tmp_path, "llama", text_file, source=source, gate="hard")
    result = export_unchecked(ExportConfig(checkpoint=native, target="bnb-8bit", out=tmp_path / "out"))
    assert result.selection_agreement is not None
    assert result.gate_error is not None
    assert result.gate_error < 1e-3
    refused = cli("export", native, "--to", "bnb-8bit", "--out", tmp_path / "exact", "--exact")
    assert refused.code == 2
    assert "gate = 'hard'" in refused.message


@pytest.mark.parametrize("change", [{"top_k": 1}, {"scale": "mean"}])
def test_what_is_folded_into_the_weights_cannot_be_changed_on_loading(
    change: dict[str, Any], exported: Callable[[Case, str], Exported]
) -> None:
    with pytest.raises(UsageError, match="its number of active experts and its scale are fixed"):
        factorctl.load(exported(CASES[0], "bnb-8bit").path, **change)


def test_an_export_for_stock_transformers_is_still_sent_there(exported: Callable[[Case, str], Exported]) -> None:
    with pytest.raises(UsageError, match=r"AutoModelForCausalLM\.from_pretrained"):
        factorctl.load(exported(CASES[0], "hf").path)


def test_a_loaded_model_refuses_to_round_its_scales(exported: Callable[[Case, str], Exported]) -> None:
    model = factorctl.load(exported(CASES[0], "bnb-4bit").path)
    with pytest.raises(ValueError, match="dtype"):
        model.to(torch.bfloat16)
    assert factorctl.load(exported(CASES[0], "bnb-4bit").path, dtype=torch.bfloat16).dtype == torch.bfloat16


DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda t: t.pop("model.layers.0.mlp.experts.down_proj.absmax"), "lacks tensor .*down_proj.absmax"),
    "unexpected": (lambda t: t.update(extra=torch.zeros(2)), "holds tensor extra"),
    "another type": (
        lambda t: t.update({DOWN: t[DOWN].to(torch.int16)}),
        "experts.down_proj is torch.int16; expected is torch.uint8",
    ),
    "another shape in the state": (
        lambda t: t.update({DOWN + STATE: t[DOWN.replace("down", "gate_up") + STATE].clone()}),
        r"says nf4 in blocks of 64 for shape \(4, 192, 64\); expected",
    ),
    "no state": (lambda t: t.update({DOWN + STATE: torch.zeros(9, dtype=torch.uint8)}), "cannot be read"),
}
DOWN, STATE = "model.layers.0.mlp.experts.down_proj", ".quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(damage: str, exported: Callable[[Case, str], Exported], tmp_path: Path) -> None:
    edit, message = DAMAGE[damage]
    copy = Path(shutil.copytree(exported(CASES[0], "bnb-4bit").path, tmp_path / "copy"))
    (shard,) = copy.glob("*.safetensors")
    tensors = load_file(shard)
    edit(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard.name)}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(IntegrityError):
        factorctl.load(copy)
    with pytest.raises(IntegrityError, match=message):
        load_quantised(copy)
