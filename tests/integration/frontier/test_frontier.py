"""`factorctl frontier` on a tiny model: what it finds is what the other verbs then make."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import DenseSource
from support.command_line import cli
from support.tiny import calibrated, factorize_quietly

from factorctl.config.export import ExportConfig
from factorctl.config.frontier import FrontierConfig
from factorctl.errors import FactorctlError, UsageError
from factorctl.evaluation.perplexity import score_text
from factorctl.exporting.jobs import Verified
from factorctl.exporting.stock.writer import SafetensorsWriter
from factorctl.models.loading import load
from factorctl.pipeline.common.recorded_source import describe_source
from factorctl.pipeline.export.plan import plan_export
from factorctl.pipeline.factorize.run import factorize
from factorctl.pipeline.frontier import points as points_module
from factorctl.pipeline.frontier import search as search_module
from factorctl.pipeline.frontier.plan import plan_frontier
from factorctl.pipeline.frontier.run import FrontierResult, frontier
from factorctl.pipeline.frontier.texts import read_texts
from factorctl.pipeline.recipe.read import read_recipe
from factorctl.pipeline.recipe.run import run_recipe
from factorctl.profiling.latency import Samples
from factorctl.progress import SilentProgress


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed by rule: as many milliseconds as neurons run, and a tenth more where they are routed."""

    def samples(variants: Mapping[Any, Any], *_: object) -> dict[Any, Samples]:
        found = {}
        for name, model in variants.items():
            ffn = model.model.layers[0].mlp
            active = ffn.shape.shared_size + ffn.top_k * ffn.shape.expert_size
            taken = 10 + active * (1.1 if ffn.routes else 1.0)
            found[name] = Samples([taken] * 3, [taken] * 6)
        return found

    monkeypatch.setattr("factorctl.pipeline.frontier.measure.measure_regime", samples)
    monkeypatch.setattr("factorctl.pipeline.frontier.run.draw_frontier", lambda *_, **__: b"a picture")
    monkeypatch.setattr("factorctl.pipeline.frontier.search.gc.collect", lambda: 0)


@pytest.fixture
def config(dense_source: DenseSource, text: Path, tmp_path: Path) -> FrontierConfig:
    return FrontierConfig(
        model=str(dense_source()),
        experts=(4,),
        calibration=str(text),
        calibration_tokens=512,
        data_tokens=600,
        prompt=32,
        rounds=3,
        device="cpu",
        out=tmp_path / "frontier",
    )


def run(config: FrontierConfig, **changes: Any) -> FrontierResult:
    return frontier(dataclasses.replace(config, **changes), SilentProgress())


@pytest.mark.usefixtures("steady")
def test_without_a_budget_the_whole_curve(config: FrontierConfig) -> None:
    result = run(config)
    assert [(point.name, point.kind) for point in result.points] == [
        ("static-20", "static"), ("1R4E1K+S12", "routed"), ("1R4E2K+S12", "routed"),
        ("static-30", "static"), ("static-38", "static"), ("1R4E3K+S12", "routed"),
    ]  # fmt: skip
    assert result.chosen is None
    assert result.untried == []
    for point in result.points:
        assert point.perplexity is not None
        assert point.perplexity_kept == pytest.approx(result.dense_perplexity / point.perplexity)
        assert point.ffn_flops_reduction == pytest.approx(1 - point.active_ffn_fraction)
        assert point.speed_up("decode") > 1
        assert point.engines["transformers 5.23"]
    assert set(result.front) == {point.name for point in result.points if point.dominated_by is None}
    written = json.loads((config.out / "frontier.json").read_text())  # type: ignore[operator]
    assert [point["name"] for point in written["points"]] == [point.name for point in result.points]
    assert result.written == [str(config.out / name) for name in ("frontier.json", "frontier.png")]  # type: ignore[operator]


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize(
    ("budget", "chosen"),
    [({"active": 0.41, "experts": (2,)}, "static-18"), ({"speed_up": 1.1, "phase": "prefill"}, "1R4E")],
)
def test_the_recipe_makes_what_was_promised(
    config: FrontierConfig, tmp_path: Path, budget: dict[str, Any], chosen: str
) -> None:
    """Perplexity to the last digits: what was promised had its own partition, not the one that all K share."""
    result = run(config, **budget)
    assert result.chosen is not None
    assert result.chosen.point.startswith(chosen)
    recipe = read_recipe(Path(result.chosen.recipe))
    stages = {stage.name: stage.config for stage in recipe.stages}
    made = factorize(dataclasses.replace(stages["factorize"], out=tmp_path / "made"), SilentProgress())  # type: ignore[arg-type]
    point = next(point for point in result.points if point.name == result.chosen.point)
    assert (made.num_experts, made.top_k, made.shared_size) == (point.num_experts, point.top_k, point.shared_size)
    plan = plan_frontier(config, SilentProgress())
    texts = read_texts(plan, describe_source(plan.source), SilentProgress())
    score = score_text(
        load(tmp_path / "made"), texts.heldout, window=plan.window, stride=plan.window // 2, progress=SilentProgress()
    )
    assert score.perplexity == pytest.approx(result.chosen.perplexity, rel=1e-6)
    assert stages["profile"].batch == (1,)  # type: ignore[union-attr]
    assert stages["profile"].prompt == (32,)  # type: ignore[union-attr]
    assert stages["export"].target == point.export_target  # type: ignore[union-attr]


@pytest.mark.usefixtures("steady")
def test_sizes_of_exports_are_those_of_the_exports(config: FrontierConfig, tmp_path: Path) -> None:
    result = run(config, experts=(2,))
    for point in result.points:
        made = tmp_path / point.name
        shape = {"num_experts": point.num_experts, "top_k": point.top_k, "shared_fraction": point.shared_size / 48}
        factorize_quietly(calibrated(Path(config.model), made, Path(config.calibration), **shape))
        target = ExportConfig(checkpoint=made, target=point.export_target, out=tmp_path / "export")  # type: ignore[arg-type]
        assert plan_export(target, SilentProgress()).disk_bytes == point.export_bytes


@pytest.mark.usefixtures("steady")
def test_an_interrupted_search_goes_on_where_it_stopped(
    config: FrontierConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run(config, out=tmp_path / "straight")
    walked: list[str] = []
    genuine = search_module.walk

    def counted(plan: Any, shape: Any, *others: Any, **options: Any) -> Any:
        walked.append(search_module.name_of(shape))
        if len(walked) == 3:
            raise KeyboardInterrupt
        return genuine(plan, shape, *others, **options)

    monkeypatch.setattr(search_module, "walk", counted)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert len(walked) == 3
    resumed = run(config)
    assert len(walked) == 3 + 4, "the third once more and the three behind it"
    assert resumed.reused == 2
    assert resumed.points == straight.points


@pytest.mark.usefixtures("steady")
def test_another_budget_measures_nothing_twice_and_other_text_everything(
    config: FrontierConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    walked: list[str] = []
    genuine = search_module.walk

    def counted(plan: Any, shape: Any, *others: Any, **options: Any) -> Any:
        walked.append(search_module.name_of(shape))
        return genuine(plan, shape, *others, **options)

    monkeypatch.setattr(search_module, "walk", counted)
    run(config)
    assert len(walked) == 6
    again = run(config, keep=0.01)
    assert again.reused == 6
    assert again.chosen is not None
    assert walked[6:] == [again.chosen.point], "the chosen one, with a partition of its own"
    assert run(config, keep=0.01).chosen == again.chosen
    assert len(walked) == 7
    run(config, calibration_tokens=256, experts=(2,))
    assert len(walked) == 9


@pytest.mark.usefixtures("steady")
def test_a_budget_that_nothing_meets_is_told_with_how_near_it_came(config: FrontierConfig) -> None:
    with pytest.raises(
        FactorctlError, match=r"none of \d+ splits meets --speed-up 50: the fastest, static-20, is"
    ) as e:
        run(config, speed_up=50.0)
    assert e.value.hint is not None
    assert "frontier.json" in e.value.hint
    assert (config.out / "frontier.json").is_file()  # type: ignore[operator]
    assert not (config.out / "recipe.toml").exists()  # type: ignore[operator]


@pytest.mark.usefixtures("steady")
def test_a_choice_that_was_luck_does_not_survive_being_measured_once_more(
    config: FrontierConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config)
    genuine = search_module.Search.confirmed
    timed: list[str] = []

    def slower(self: Any, point: Any) -> Any:
        timed.append(point.name)
        found = genuine(self, point)
        if len(timed) > 1:
            return found
        return dataclasses.replace(found, decode=dataclasses.replace(found.decode, median=0.9))

    monkeypatch.setattr(search_module.Search, "confirmed", slower)
    result = run(config, speed_up=1.05)
    assert result.chosen is not None
    assert len(timed) == 2
    assert result.chosen.point == timed[1]
    assert next(point for point in result.points if point.name == timed[0]).speed_up("decode") == 0.9


@pytest.mark.usefixtures("steady")
def test_a_hopeless_split_is_dropped_and_named(config: FrontierConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points_module, "MARGIN", 0.0)
    progress = SilentProgress()
    result = frontier(config, progress)
    dropped = [point for point in result.points if point.dropped is not None]
    assert dropped
    assert all(point.perplexity is None and point.dominated_by is None for point in dropped)
    assert any(
        note.startswith(f"{dropped[0].name} is dropped: behind a third of the layers") for note in progress.notes
    )
    assert run(config).points == result.points, "it stays dropped"


@pytest.mark.usefixtures("steady")
def test_a_split_that_was_dropped_for_a_budget_is_tried_when_that_is_gone(
    config: FrontierConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as strict:
        strict.setattr(points_module, "MARGIN", 0.0)
        assert any(point.dropped for point in run(config).points)
    result = run(config)
    assert all(point.measured for point in result.points)
    assert 0 < result.reused < 6


@pytest.mark.usefixtures("steady")
def test_what_no_stock_form_holds_stays_a_checkpoint(config: FrontierConfig, dense_source: DenseSource) -> None:
    result = run(config, model=str(dense_source("gemma")), experts=(2,), active=0.65)
    routed, static = result.points
    assert (routed.export_target, any(routed.engines.values())) == ("native", False)
    assert (static.export_target, all(static.engines.values())) == ("dense", True)
    assert result.chosen is not None
    recipe = Path(result.chosen.recipe).read_text()
    assert ("[export]" in recipe) == (result.chosen.point == static.name)


@pytest.mark.usefixtures("steady")
def test_time_bounds_the_search_from_coarse_to_fine(config: FrontierConfig) -> None:
    result = run(config, time=1e-6)
    assert [point.name for point in result.points] == ["static-30"], "the first is always tried"
    assert result.untried == ["1R4E2K+S12", "static-20", "1R4E1K+S12", "static-38", "1R4E3K+S12"]
    assert any("no time was left for 1R4E2K+S12" in remark for remark in result.remarks)
    assert len(run(config).points) == 6


def test_held_out_documents_are_none_that_calibration_saw(config: FrontierConfig) -> None:
    plan = plan_frontier(config, SilentProgress())
    texts = read_texts(plan, describe_source(plan.source), SilentProgress())
    seen = texts.calibration_BL.flatten().tolist()
    rows = ",".join(map(str, seen))
    assert len(texts.heldout) > 3
    assert 500 < sum(len(document.ids) for document in texts.heldout) <= 600
    for document in texts.heldout:
        assert ",".join(map(str, document.ids[:20])) not in rows


def test_without_any_text_the_model_samples_both_and_says_so_once(config: FrontierConfig) -> None:
    progress = SilentProgress()
    plan = plan_frontier(dataclasses.replace(config, calibration="self"), progress)
    texts = read_texts(plan, describe_source(plan.source), progress)
    assert texts.heldout_name == "self, another seed"
    assert texts.calibration_BL[0].tolist() != texts.heldout[0].ids
    assert [note for note in progress.notes if "sample" in note] == [
        "calibrating on text sampled from the model itself; give --calibration DATA for your own",
        "quality is measured on text that the model samples itself; give --data for your own",
    ]


def test_a_text_that_calibration_used_up_is_refused(config: FrontierConfig, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(Path(config.calibration).read_text().splitlines(keepends=True)[:5]))
    plan = plan_frontier(dataclasses.replace(config, calibration=str(few)), SilentProgress())
    with pytest.raises(UsageError, match=r"all documents of .* were calibrated on") as caught:
        read_texts(plan, describe_source(plan.source), SilentProgress())
    assert caught.value.hint == "give held-out text of its own (--data DATA), or lower --calibration-tokens"


def test_text_of_the_model_itself_is_no_held_out_text(config: FrontierConfig) -> None:
    with pytest.raises(UsageError, match="--data self is no held-out text"):
        plan_frontier(dataclasses.replace(config, data="self"), SilentProgress())


def test_the_command_line_measures_draws_and_the_recipe_runs(
    config: FrontierConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real timing, a real picture, and every stage of the recipe; only the export's stock engine is not asked."""
    monkeypatch.setattr(SafetensorsWriter, "verify", lambda *_: Verified("nothing", None))
    out, workspace = tmp_path / "it's", tmp_path / "runs"
    command = [
        *(
            "frontier",
            config.model,
            "--experts",
            "2",
            "--calibration",
            config.calibration,
            "--data",
            config.calibration,
        ),
        *("--calibration-tokens", 512, "--data-tokens", 300, "--prompt", 16, "--rounds", 3, "--active", 0.7),
        *("--device", "cpu", "--out", out),
    ]
    plan = cli(*command, "--dry-run", "--format", "json")
    assert plan.json["splits"] == ["static-30", "1R2E1K+S12"]
    assert not out.exists()
    outcome = cli(*command, "--format", "json")
    assert outcome.code == 0, outcome.stderr
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    chosen = outcome.json["chosen"]
    ran = run_recipe(read_recipe(out / "recipe.toml"), workspace, SilentProgress())
    assert [stage.stage for stage in ran.stages][:3] == ["factorize", "eval", "profile"]
    found = next(iter(ran.result_of("eval")["perplexity"].values()))
    assert found["dense"] > 0
    assert chosen["perplexity"] > 0
    table = cli(*command)
    assert "What each split keeps and wins" in table.stdout
    assert f"Next: factorctl run {shlex.quote(str(out / 'recipe.toml'))}" in " ".join(table.stdout.split("\n")).replace(
        "  ", " "
    )


def test_a_context_too_short_for_the_prompt_is_told(config: FrontierConfig) -> None:
    with pytest.raises(UsageError, match="--prompt 1020 and 8 tokens of decoding") as caught:
        plan_frontier(dataclasses.replace(config, prompt=1020), SilentProgress())
    assert caught.value.hint == "choose at most 1016"
