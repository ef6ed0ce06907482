"""An architecture is a file: one that is put beside the others is exported to, without a change anywhere else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from gguf import GGUFReader
from support.exporting import make_gguf_source, make_native

from factorctl.config.export import Arch, ExportConfig
from factorctl.errors import UsageError
from factorctl.exporting.check import gguf_proof
from factorctl.exporting.features import features_of
from factorctl.exporting.stock import architectures as rooms
from factorctl.exporting.stock.choice import architecture_for
from factorctl.models.loading import open_checkpoint
from factorctl.pipeline.export.run import export
from factorctl.progress import SilentProgress

GRANITE_MOE = """
from dataclasses import replace

from factorctl.exporting.stock.architecture import GgufGraph
from factorctl.exporting.stock.architectures import granite_moe_shared

GRANITE = granite_moe_shared.ARCHITECTURE


def config(dense, num_experts, sizes):
    shared = granite_moe_shared.config(dense, num_experts, sizes)
    return {key: value for key, value in shared.items() if key != "shared_intermediate_size"}


def metadata(dense, sizes):
    shared = GRANITE.gguf.metadata(dense, sizes)
    return {key: value for key, value in shared.items() if "shared" not in key}


ARCHITECTURE = replace(
    GRANITE,
    option="granite-moe",
    model_type="granitemoe",
    class_name="GraniteMoeForCausalLM",
    shared="none",
    config=config,
    beside=lambda ffn, layer: {},
    families=("llama",),
    gguf=GgufGraph("granitemoe", metadata),
)
"""
"""IBM's GraniteMoe, which no user needs beside Mixtral, as the own mixture of experts of Llama."""


@pytest.fixture
def _granite_moe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "added").mkdir()
    (tmp_path / "added" / "granite_moe.py").write_text(GRANITE_MOE)
    monkeypatch.setattr(rooms, "__path__", [*rooms.__path__, str(tmp_path / "added")])
    yield
    monkeypatch.undo()


@pytest.fixture
def native(tmp_path: Path, text_file: Path) -> Path:
    source = make_gguf_source(tmp_path / "dense", "llama", intermediate_size=192)
    return make_native(tmp_path, "llama", text_file, source=source)


@pytest.mark.usefixtures("_granite_moe")
def test_it_is_found_and_stock_transformers_computes_the_same(native: Path, tmp_path: Path) -> None:
    result = export(ExportConfig(checkpoint=native, out=tmp_path / "hf"), SilentProgress())
    assert result.architecture == "GraniteMoeForCausalLM"
    assert result.all_experts_error is not None
    assert result.all_experts_error < 1e-5
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["model_type"] == "granitemoe"
    assert "shared_intermediate_size" not in config


@pytest.mark.usefixtures("_granite_moe")
def test_a_gguf_takes_its_graph(native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_proof, "has_llama_cpp", lambda: False)
    result = export(ExportConfig(checkpoint=native, target="gguf", out=tmp_path / "gguf"), SilentProgress())
    assert result.architecture == "granitemoe"
    assert result.max_logit_error is not None
    assert result.max_logit_error < 1e-4
    fields = GGUFReader(tmp_path / "gguf" / "model.gguf").fields
    assert fields["granitemoe.feed_forward_length"].contents() == 48
    assert fields["granitemoe.attention.scale"].contents() == pytest.approx(8**-0.5)
    assert "granitemoe.expert_shared_feed_forward_length" not in fields


def test_each_is_called_as_its_file() -> None:
    files = {path.stem for path in Path(rooms.__path__[0]).glob("[a-z]*.py")}
    assert {row.option.replace("-", "_") for row in rooms.architectures()} == files
    assert set(get_args(Arch)) == {"auto", *(row.option for row in rooms.architectures())}


def test_without_its_file_it_is_refused_by_name(native: Path) -> None:
    checkpoint = open_checkpoint(native)
    assert architecture_for(checkpoint.dense, checkpoint.spec).option == "mixtral"
    with pytest.raises(UsageError, match="--arch granite-moe is not known") as refusal:
        architecture_for(checkpoint.dense, checkpoint.spec, "granite-moe")
    assert "granite-moe-shared" in str(refusal.value.hint)


def test_what_llama_cpp_is_told_of_each_graph(native: Path) -> None:
    """As its `src/models/*.cpp` read it: what a file says wrongly here, no value of a tensor shows."""
    dense = open_checkpoint(native).dense
    graphs = {row.gguf.name: row.gguf for row in rooms.architectures() if row.gguf is not None}
    turns = {name: (graph.rotates_neighbours, graph.reads_rope_factors) for name, graph in graphs.items()}
    assert turns == {"llama": (True, True), "granitemoe": (True, True), "qwen3moe": (False, False)}
    sizes = rooms.architectures()[0].sizes(open_checkpoint(native).spec.shape, 1)
    assert features_of(dense).head_dim == 8
    assert graphs["llama"].metadata(dense, sizes) == {"feed_forward_length": 48}
    assert graphs["qwen3moe"].metadata(dense, sizes) == {
        "feed_forward_length": 192,
        "expert_feed_forward_length": 48,
    }
    assert graphs["granitemoe"].metadata(dense, sizes) == {
        "feed_forward_length": 48,
        "expert_shared_feed_forward_length": 0,
        "logit_scale": 1.0,
        "residual_scale": 1.0,
        "embedding_scale": 1.0,
        "attention.scale": 8**-0.5,
    }
