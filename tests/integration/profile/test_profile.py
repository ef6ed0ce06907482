"""The whole `profile` on a tiny checkpoint: keys of the JSON, plots, page, remarks and refusals."""

from __future__ import annotations

import dataclasses
import json
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import DenseSource
from support.tiny import factorize_quietly, weights_only

from factorctl.cli.render import report_table, show
from factorctl.config.profile import ProfileConfig
from factorctl.errors import ResourceError, UsageError
from factorctl.ffn.tuned import cache_file, read_tuned
from factorctl.models.loading import open_checkpoint
from factorctl.pipeline.common import devices
from factorctl.pipeline.profile import run as pipeline
from factorctl.pipeline.profile.html_report import html_page
from factorctl.pipeline.profile.report import report_tables
from factorctl.pipeline.profile.run import profile
from factorctl.profiling.report import ProfileResult
from factorctl.progress import SilentProgress
from factorctl.reporting.tables import figure

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates without streaming a quarter of a gigabyte."""
    monkeypatch.setattr("factorctl.profiling.roofline.STREAM_BYTES", 1 << 16)
    monkeypatch.setattr("factorctl.profiling.tuning.TOKEN_COUNTS", (1, 8))


def small(checkpoint: Path, **changes: object) -> ProfileConfig:
    plain = ProfileConfig(
        checkpoint=checkpoint, batch=(1, 2), prompt=(8,), decode_tokens=2, rounds=3, data="random", device="cpu"
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def run(config: ProfileConfig) -> tuple[ProfileResult, list[str]]:
    progress = SilentProgress()
    return profile(config, progress), progress.notes


def test_json_holds_the_promised_keys(checkpoint: Path, tmp_path: Path) -> None:
    run(small(checkpoint, out=tmp_path / "deep" / "report.json", sweep_k=True))
    report = json.loads((tmp_path / "deep" / "report.json").read_text())
    for side in ("dense", "model", "executed"):
        assert {"ffn", "router", "attention", "head", "total"} <= set(report["flops"][side])
    assert report["ffn_flops_reduction"] == pytest.approx(0.5)
    assert 0 < report["total_flops_reduction"] < 0.5
    assert len(report["latency"]) == 4
    row = report["latency"][0]
    assert {"phase", "batch", "tokens", "path", "dense_ms", "model_ms", "speedup", "ceiling"} <= set(row)
    assert set(row["speedup"]) == {"median", "low", "high"}
    assert {name: len(samples) for name, samples in row["samples_ms"].items()} == {
        "model": 3, "dense": 3, "narrow": 3, "stock": 3,
    }  # fmt: skip
    assert len(report["expert_load"]) == 2
    assert report["versions"]["torch"]
    assert report["hardware"]["cores"] >= 1
    assert report["flops"]["counter_difference"] < 1e-3
    assert [row["notation"] for row in report["sweep"]] == ["1R4E1K", "1R4E2K", "1R4E3K", "dense"]
    assert report["notation"] == "1R4E2K"


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


def test_plots_and_page_are_self_contained(checkpoint: Path, tmp_path: Path) -> None:
    run(small(checkpoint, html=tmp_path / "report.html", plots=tmp_path / "plots"))
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "expert_load.png",
        "flops.png",
        "speedup.png",
    ]
    assert all(path.read_bytes().startswith(PNG) for path in (tmp_path / "plots").iterdir())
    page = _Links()
    page.feed((tmp_path / "report.html").read_text())
    assert len(page.sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not page.tags & {"script", "link", "iframe"}


def test_losing_regimes_are_marked_and_text_is_escaped(checkpoint: Path) -> None:
    result, _ = run(small(checkpoint))
    slow = dataclasses.replace(result.latency[0], speedup=dataclasses.replace(result.latency[0].speedup, median=0.5))
    fast = dataclasses.replace(slow, speedup=dataclasses.replace(slow.speedup, median=1.5))
    shown = dataclasses.replace(result, latency=[slow, fast], checkpoint="<b>&", remarks=["a < b"])
    page = html_page(shown, {})
    assert page.count('<tr class="loses">') == 1
    assert "&lt;b&gt;&amp;" in page
    assert "a &lt; b" in page
    assert slow.loses
    assert not fast.loses


def test_the_page_and_the_terminal_show_the_same_tables(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result, _ = run(small(checkpoint, sweep_k=True))
    tables = report_tables(result)
    assert list(tables) == ["flops", "sweep", "latency", "anchors", "ffn", "load"]
    page = html_page(result, {})
    show(result, output="text", tables=[report_table(table) for table in tables.values()])
    printed = capsys.readouterr().out
    for table in tables.values():
        assert escape(table.title) in page
        assert all(len(row) == len(table.columns) for row in table.rows)
        for cell in [cell for row in table.rows for cell in row]:
            assert f"<td>{cell}</td>" in page
            assert cell in printed
    assert len(tables["latency"].rows) == len(result.latency)
    assert tables["load"].rows[0][0] == "0"


def test_a_profile_without_latency_has_no_empty_tables(checkpoint: Path) -> None:
    assert list(report_tables(run(small(checkpoint, latency=False))[0])) == ["flops", "load"]


def test_figures_are_short_without_powers_of_ten() -> None:
    assert [figure(value) for value in (0.0123456, 1.5, 999.87, 71_680.4)] == ["0.01235", "1.5", "999.9", "71,680"]


def test_prompts_beyond_the_context_are_timed_and_said_to_be(checkpoint: Path) -> None:
    context = open_checkpoint(checkpoint).dense.context
    _, notes = run(small(checkpoint, latency=False, prompt=(8, context)))
    told = f"prompts reach {context + 2:,} tokens, the model's context {context:,}: "
    assert any(note.startswith(told) for note in notes)
    _, notes = run(small(checkpoint, latency=False))
    assert not any("context" in note for note in notes)


def test_random_tokens_are_said_to_be_random(checkpoint: Path) -> None:
    result, notes = run(small(checkpoint, latency=False))
    assert result.text == "random tokens"
    assert any("random tokens decide the routing" in note for note in notes)
    assert result.latency == []


def test_text_decides_the_routing(checkpoint: Path, text_file: Path) -> None:
    result, _ = run(small(checkpoint, latency=False, data=str(text_file)))
    assert result.text == f"text: {text_file}"
    assert not any("random" in remark for remark in result.remarks)


def test_own_samples_decide_the_routing_by_default(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factorctl.pipeline.profile.text.TEXT_TOKENS", 512)
    result, notes = run(small(checkpoint, latency=False, data="self"))
    assert result.text == "text: self"
    assert any("sampled from the model itself" in note for note in notes)


def test_tuning_is_cached_for_this_machine(checkpoint: Path) -> None:
    result, _ = run(small(checkpoint, latency=False, tune=True))
    assert result.tuning is not None
    assert read_tuned(cache_file())[result.tuning.site] == result.tuning.steps
    assert set(result.tuning.timings_ms) == {1, 8}


def test_a_missing_kernel_is_said(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = pipeline.look_at_hardware
    monkeypatch.setattr(
        pipeline, "look_at_hardware", lambda *args: dataclasses.replace(looked(*args), no_kernel="no C++ compiler")
    )
    result, notes = run(small(checkpoint, latency=False))
    assert "computed by torch alone, without the compiled kernel: no C++ compiler" in notes
    assert result.hardware.no_kernel == "no C++ compiler"


def test_a_busy_machine_is_marked_or_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = pipeline.look_at_hardware
    monkeypatch.setattr(
        pipeline, "look_at_hardware", lambda *args: dataclasses.replace(looked(*args), load_1min=7.0, cores=2)
    )
    result, notes = run(small(checkpoint, latency=False))
    assert result.busy
    assert any("the machine is busy: load 7 on 2 cores" in note for note in notes)
    with pytest.raises(ResourceError, match="the machine is busy: load 7 on 2 cores"):
        run(small(checkpoint, latency=False, require_quiet=True))


def test_emulated_bfloat16_is_left_out_aloud(
    dense_source: DenseSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    factorize_quietly(weights_only(dense_source("llama", dtype=torch.bfloat16), tmp_path / "bf16"))
    monkeypatch.setattr(devices, "has_fast_bfloat16", lambda device: False)
    result, notes = run(small(tmp_path / "bf16", latency=False))
    assert result.hardware.dtype == "float32"
    assert any("this CPU has no bfloat16 arithmetic" in note for note in notes)
    monkeypatch.setattr(devices, "has_fast_bfloat16", lambda device: True)
    assert run(small(tmp_path / "bf16", latency=False))[0].hardware.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": (0,)}, r"--batch 0 holds no positive numbers only"),
        ({"prompt": ()}, r"--prompt nothing holds no positive numbers only"),
        ({"rounds": 0}, r"--rounds 0 is no positive number"),
        ({"decode_tokens": 0}, r"--decode-tokens 0 is no positive number"),
    ],
)
def test_bad_numbers(checkpoint: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        small(checkpoint, **changes)


def test_static_pruning_is_profiled_too(dense_source: DenseSource, text_file: Path, tmp_path: Path) -> None:
    factorize_quietly(
        weights_only(
            dense_source("llama"), tmp_path / "pruned", shared_fraction=0.5, top_k=0,
            calibration=str(text_file), calibration_tokens=512,
        )
    )  # fmt: skip
    result, _ = run(small(tmp_path / "pruned", html=tmp_path / "r.html", tune=True))
    assert result.expert_load == []
    assert result.tuning is None
    assert result.ffn_flops_reduction == pytest.approx(0.5)
