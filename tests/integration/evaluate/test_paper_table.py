"""`eval --paper-table`: FactorLLM's table out of finished reports, and the recipes that make them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import DenseSource
from support.command_line import cli
from support.evaluating import run
from support.tiny import factorize_quietly, weights_only

from factorctl.errors import ExitCode
from factorctl.models.loading import open_checkpoint
from factorctl.pipeline.recipe.read import read_recipe
from factorctl.profiling.flops import count_flops
from factorctl.profiling.sizes import ModelSizes

pytestmark = pytest.mark.usefixtures("no_collection", "no_pictures")
DOCS = Path(__file__).parents[3] / "docs"
RECIPES, UNSEEN = (sorted((DOCS / name).glob("*.toml")) for name in ("paper-table", "unseen-domains"))


@pytest.fixture(scope="module")
def reports(
    checkpoint: Path,
    dense_source: DenseSource,
    text_file: Path,
    task_files: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """One with three experts active and no controls, one with two and all of them."""
    root = tmp_path_factory.mktemp("reports")
    factorize_quietly(weights_only(dense_source(), root / "three", top_k=3))
    options = {"data": (str(text_file),), "tasks": ("piqa",), "task_data": task_files, "limit": 4, "fidelity": False}
    run(root / "three", root / "a", **options)
    run(checkpoint, root / "b", controls="all", calibration=str(text_file), **options)
    return root / "a", root / "b"


def test_rows_are_those_of_the_reports_and_their_controls(reports: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = reports
    outcome = cli("eval", "--paper-table", a, "--paper-table", b / "results.json", "--format", "json")
    assert outcome.code == ExitCode.DONE, outcome.stderr
    rows = outcome.json["rows"]
    assert [row["method"] for row in rows] == [
        "dense",
        "1R4E3K",
        "1R4E2K",
        "random routing (1R4E2K)",
        "MoEfication, untrained (1R4E2K)",
        "KnowledgeFactor (1R4E2K)",
    ]
    report = json.loads((b / "results.json").read_text())
    controls = [report["controls"][name] for name in ("random_routing", "moefication", "knowledge_factor")]
    for row, found in zip(rows[2:], [report["model"], *controls], strict=True):
        assert (row["tasks"], row["average"], row["kept"]) == (found["tasks"], found["task_average"], found["kept"])
        assert row["perplexity"] == found["perplexity"]
    written = cli("eval", "--paper-table", a, "--paper-table", b, "--report", tmp_path / "deep" / "table.md")
    assert "1R4E3K" in written.stdout
    table = (tmp_path / "deep" / "table.md").read_text()
    assert "| method | active FFN | attention GFLOPs | FFN GFLOPs | perplexity | piqa | average | kept |" in table
    assert table.count("\n| ") == 1 + 1 + len(rows)


def test_reports_of_the_same_split_are_told_apart(reports: tuple[Path, Path]) -> None:
    a, b = reports
    rows = cli("eval", "--paper-table", b, "--paper-table", a, "--paper-table", b, "--format", "json").json["rows"]
    methods = [row["method"] for row in rows]
    assert methods[1:4] == [f"1R4E2K, {b}", "1R4E3K", f"1R4E2K, {b}"]
    assert f"KnowledgeFactor (1R4E2K, {b})" in methods


def test_flops_are_those_of_profile_and_follow_the_active_share(reports: tuple[Path, Path], checkpoint: Path) -> None:
    rows = cli("eval", "--paper-table", reports[1], "--format", "json").json["rows"]
    native = open_checkpoint(checkpoint)
    sizes = ModelSizes.of(native.dense.config, native.spec.shape)
    for row, one in ((rows[0], sizes.dense), (rows[1], sizes)):
        flops = count_flops(one, 32)
        assert row["attention_gflops"] == pytest.approx(flops.attention / 1e9)
        assert row["ffn_gflops"] == pytest.approx((flops.ffn + flops.router) / 1e9)


def test_reports_of_other_dense_models_and_what_is_no_report_are_refused(
    reports: tuple[Path, Path], tmp_path: Path
) -> None:
    other = json.loads((reports[0] / "results.json").read_text()) | {"source": "another"}
    (tmp_path / "other.json").write_text(json.dumps(other))
    refused = cli("eval", "--paper-table", reports[0], "--paper-table", tmp_path / "other.json")
    assert refused.code == ExitCode.USAGE
    assert "the reports compare with different dense models" in refused.message
    (tmp_path / "none.json").write_text("{}")
    assert "is no report of `factorctl eval`" in cli("eval", "--paper-table", tmp_path / "none.json").message


def test_a_report_of_an_older_version_has_no_flops(reports: tuple[Path, Path], tmp_path: Path) -> None:
    old = json.loads((reports[0] / "results.json").read_text())
    for row in (old["dense"], old["model"]):
        del row["gflops"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    outcome = cli("eval", "--paper-table", tmp_path / "old.json", "--format", "json")
    assert [row["ffn_gflops"] for row in outcome.json["rows"]] == [None, None]
    assert any("holds no FLOPs" in remark for remark in outcome.json["remarks"])


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_the_recipes_of_the_docs_can_be_read_and_differ_in_what_they_are_named_for(path: Path) -> None:
    recipe = read_recipe(path)
    by_name = {stage.name: stage.config for stage in recipe.stages}
    assert list(by_name) == ["factorize", "finetune", "eval"]
    assert by_name["finetune"].tokens == 61_440  # type: ignore[union-attr]
    assert by_name["finetune"].routing == ("domain" if path.stem == "knowledge-factor" else None)  # type: ignore[union-attr]
    expected = {"1R4E3K": 3, "1R4E1K": 1}.get(path.stem, 2)
    assert by_name["factorize"].top_k == expected  # type: ignore[union-attr]


def test_there_are_five() -> None:
    assert [path.stem for path in RECIPES] == ["1R4E1K", "1R4E2K", "1R4E3K", "knowledge-factor", "ours-1R4E2K"]


@pytest.mark.parametrize("path", UNSEEN, ids=[path.stem for path in UNSEEN])
def test_the_recipes_of_unseen_domains_keep_them_from_calibration_and_training(path: Path) -> None:
    by_name = {stage.name: stage.config for stage in read_recipe(path).stages}
    kept_out = "train-00.jsonl.xz:domain!=code+textbook"
    assert (by_name["factorize"].calibration, by_name["finetune"].data) == (kept_out, kept_out)  # type: ignore[union-attr]
    assert by_name["eval"].data == ("valid.jsonl.xz",)  # type: ignore[union-attr]


def test_both_unseen_recipes_have_as_many_active_neurons() -> None:
    shapes = [read_recipe(path).stages[0].config.shape_for(1536) for path in UNSEEN]  # type: ignore[union-attr]
    assert [shape.top_k for shape in shapes] == [3, 0]
    assert shapes[0].active_neurons == shapes[1].active_neurons
