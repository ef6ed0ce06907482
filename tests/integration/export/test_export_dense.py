"""`--to dense` and the forms made of it: the source bit for bit, a narrower model at K = 0, bitsandbytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import DenseSource
from support.exporting import ask_about, export_unchecked, largest_difference, make_native
from support.tiny import CASES, make_source

from factorctl.checkpoint.reader import CheckpointReader
from factorctl.config.export import ExportConfig
from factorctl.exporting.check.stock import StockAnswer
from factorctl.pipeline.export.run import export
from factorctl.progress import SilentProgress


@pytest.mark.parametrize("shared", [False, True], ids=["routed", "shared"])
@pytest.mark.parametrize("case", CASES)
def test_an_untrained_checkpoint_gives_the_source_back_bit_for_bit(
    case: str, shared: bool, dense_source: DenseSource, text_file: Path, tmp_path: Path
) -> None:
    source = dense_source(case, dtype=torch.bfloat16)
    native = make_native(tmp_path, case, text_file, shared=shared, source=source, strategy="permuted")
    result = export_unchecked(ExportConfig(checkpoint=native, target="dense", out=tmp_path / "dense"))
    assert result.identical_to_source is True
    before, after = CheckpointReader(source), CheckpointReader(tmp_path / "dense")
    assert before.entries.keys() == after.entries.keys()
    for name in before.entries:
        assert torch.equal(before.read(name), after.read(name)), name
    assert json.loads((tmp_path / "dense" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "dense" / name).read_bytes() == (source / name).read_bytes()


def test_a_refitted_checkpoint_is_said_not_to_be_the_source(
    dense_source: DenseSource, text_file: Path, tmp_path: Path
) -> None:
    native = make_native(
        tmp_path, "llama", text_file, shared=True, source=dense_source(), refit=True, router="analytic"
    )
    result = export_unchecked(ExportConfig(checkpoint=native, target="dense", out=tmp_path / "dense"))
    assert result.identical_to_source is False
    assert any("no longer the source's dense model" in note for note in result.notes)


NARROW = ("llama", "llama-biases", "qwen3", "phi3", "gemma2", "gemma3_text")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> dict[str, tuple[Path, StockAnswer]]:
    directory = tmp_path_factory.mktemp("narrow")
    natives = {case: make_native(directory, case, text_file, shared=True, top_k=0) for case in NARROW}
    paths = {case: directory / f"{case}-export" for case in NARROW}
    for case, path in paths.items():
        export_unchecked(ExportConfig(checkpoint=natives[case], target="dense", out=path))
    answers = ask_about(paths)
    return {case: (natives[case], answers[case]) for case in NARROW}


@pytest.mark.parametrize("case", NARROW)
def test_without_experts_it_is_a_narrower_dense_model(case: str, narrow: dict[str, tuple[Path, StockAnswer]]) -> None:
    native, answer = narrow[case]
    assert "Moe" not in answer.class_name
    assert largest_difference(native, answer) < 1e-4


@pytest.mark.parametrize(("target", "limit"), [("bnb-4bit", 0.35), ("bnb-8bit", 0.55)])
def test_bitsandbytes_quantises_every_projection_and_reloads(
    target: str, limit: float, tmp_path: Path, text_file: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    source = make_source(tmp_path / "source", "phi3", hidden_size=128, intermediate_size=384, head_dim=32)
    native = make_native(tmp_path, "phi3", text_file, source=source, top_k=4)
    result = export(
        ExportConfig(checkpoint=native, target=target, dtype="bfloat16", out=tmp_path / "out"),  # type: ignore[arg-type]
        SilentProgress(),
    )
    reader = CheckpointReader(tmp_path / "out")
    projections = [name for name in reader.entries if name.endswith("_proj.weight")]
    assert len(projections) == 8
    assert {reader.entry(name).dtype for name in projections} == {torch.uint8 if "4" in target else torch.int8}
    in_bf16 = sum(entry.nbytes for entry in CheckpointReader(source).entries.values()) / 2
    assert result.memory_bytes is not None
    assert result.memory_bytes < (limit + 0.1) * in_bf16
    assert result.kl is not None
    assert result.kl > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, None),
        ({"dtype": "bfloat16"}, "the weights are the source's, in another type than it stores them in"),
        ({"refit": True}, "the weights were trained or refitted: this is no longer the source's dense model"),
    ],
)
def test_a_dense_export_says_what_became_of_the_source_s_weights(
    options: dict[str, object], said: str | None, dense_source: DenseSource, text_file: Path, tmp_path: Path
) -> None:
    native = make_native(tmp_path, "llama", text_file, source=dense_source("llama"), **options)
    result = export_unchecked(ExportConfig(checkpoint=native, target="dense", out=tmp_path / "dense"))
    spoken = [note for note in result.notes if note.startswith("the weights")]
    assert spoken == ([] if said is None else [said])
