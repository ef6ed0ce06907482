"""What DATA and token counts on the command line mean, and the messages for what they cannot mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from factorctl.config.quantities import parse_token_count
from factorctl.data.row_filter import RowFilter
from factorctl.data.spec import (
    DEFAULT_PRETRAINING_DATA,
    FileSource,
    HubSource,
    SelfSource,
    format_suffix,
    parse_data_spec,
)
from factorctl.errors import ExitCode, UsageError


def test_self() -> None:
    spec = parse_data_spec("self")
    assert spec.sources == (SelfSource(),)
    assert spec.weights == (1.0,)
    assert spec.uses_self
    assert spec.self_share == 1.0


@pytest.mark.parametrize(
    ("text", "repo", "config", "revision"),
    [
        ("user/name", "user/name", None, None),
        ("user/name:sample-10BT", "user/name", "sample-10BT", None),
        ("user/name@v1.2", "user/name", None, "v1.2"),
        ("user/name:en@refs/convert/parquet", "user/name", "en", "refs/convert/parquet"),
        (DEFAULT_PRETRAINING_DATA, "HuggingFaceFW/fineweb-edu", "sample-10BT", None),
    ],
)
def test_hub_dataset(text: str, repo: str, config: str | None, revision: str | None) -> None:
    assert parse_data_spec(text).sources == (HubSource(text, repo, config, revision),)


def test_local_file_and_folder(tmp_path: Path) -> None:
    (tmp_path / "deep" / ".hidden").mkdir(parents=True)
    for name in ("b.txt", "a.jsonl.xz", "deep/c.parquet", "README.md", "deep/.hidden/d.txt"):
        (tmp_path / name).write_text("x")
    (source,) = parse_data_spec(str(tmp_path / "b.txt")).sources
    assert source == FileSource(str(tmp_path / "b.txt"), tmp_path, ("b.txt",))
    (source,) = parse_data_spec(str(tmp_path)).sources
    assert isinstance(source, FileSource)
    assert source.files == ("a.jsonl.xz", "b.txt", "deep/c.parquet")


def test_local_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("user/name", "self", "a=0.5"):
        Path(folder).mkdir(parents=True)
        Path(folder, "x.txt").write_text("x")
    Path("one,two.txt").write_text("x")
    for text in ("user/name", "self", "one,two.txt", "a=0.5"):
        (source,) = parse_data_spec(text).sources
        assert isinstance(source, FileSource)
        assert source.name == text
    assert parse_data_spec("a=0.5=3,user/other=1").weights == (0.75, 0.25)


def test_shares() -> None:
    assert parse_data_spec("a/b,self").weights == (0.5, 0.5)
    spec = parse_data_spec(" a/b = 7 , self=1 ")
    assert [source.name for source in spec.sources] == ["a/b", "self"]
    assert spec.weights == (0.875, 0.125)
    assert spec.self_share == 0.125


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--data is empty"),
        ("a/b,,c/d", "--data has an empty part between its commas"),
        ("nothing", "--data 'nothing' was not found: no such file or folder, not a Hub dataset id (user/name), and"),
        ("data/train.jsonl.xz", "--data 'data/train.jsonl.xz' was not found"),
        ("./user/name", "--data './user/name' was not found"),
        ("a/b=0.5,c/d", "--data: 'c/d' has no weight and others have"),
        ("a/b=0", "--data: the weight '0' of 'a/b' is not a number above 0"),
        ("a/b=nan", "--data: the weight 'nan' of 'a/b'"),
        ("a/b=inf", "--data: the weight 'inf' of 'a/b'"),
        ("a/b=much", "--data: the weight 'much' of 'a/b'"),
        ("a/b,a/b", "--data names 'a/b' twice"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_data_spec(text)
    assert caught.value.message.startswith(message)
    assert caught.value.hint
    assert caught.value.exit_code == ExitCode.USAGE


def test_refused_local(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("x")
    with pytest.raises(
        UsageError,
        match=r"--calibration '.*table.csv': files of type '.csv' are not read\nHint.*all but .parquet also with .gz",
    ):
        parse_data_spec(str(tmp_path / "table.csv"), option="--calibration")
    with pytest.raises(UsageError, match="is a folder without text files"):
        parse_data_spec(str(tmp_path))


def test_format_suffix() -> None:
    assert format_suffix("a.JSONL.XZ") == ".jsonl"
    assert format_suffix("a.txt") == ".txt"
    assert format_suffix("a.xz") is None
    assert format_suffix("a.tar.gz") is None


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("64K", 64_000),
        ("65536", 65_536),
        ("65,536", 65_536),
        ("40m", 40_000_000),
        ("1.5B", 1_500_000_000),
        ("1_000", 1000),
    ],
)
def test_token_count(text: str, count: int) -> None:
    assert parse_token_count(text) == count


@pytest.mark.parametrize("text", ["0", "0K", "-5", "many", "", "1.5", "1.2345K", "5T", "1e6", "64 K", "nan"])
def test_token_count_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--calibration-tokens '.*number of tokens[^\n]*\nHint: .*64K"):
        parse_token_count(text, "--calibration-tokens")


@pytest.mark.parametrize(
    ("suffix", "rows", "weight"),
    [
        (":domain=code", RowFilter("domain", ("code",), keeps=True), 1.0),
        (":domain!=code+text book", RowFilter("domain", ("code", "text book"), keeps=False), 1.0),
        (":meta.year=2020", RowFilter("meta.year", ("2020",), keeps=True), 1.0),
        (":domain!=code=0.25", RowFilter("domain", ("code",), keeps=False), 0.25),
    ],
)
def test_rows_of_a_file_by_a_field(tmp_path: Path, suffix: str, rows: RowFilter, weight: float) -> None:
    (tmp_path / "a.jsonl").write_text("x")
    (tmp_path / "b.jsonl").write_text("x")
    beside = "" if weight == 1.0 else f",{tmp_path / 'b.jsonl'}={1 - weight}"
    spec = parse_data_spec(f"{tmp_path / 'a.jsonl'}{suffix}{beside}")
    source = spec.sources[0]
    assert isinstance(source, FileSource)
    assert (source.rows, source.files, spec.weights[0]) == (rows, ("a.jsonl",), weight)


def test_rows_of_a_hub_dataset_and_a_weight_behind_its_config() -> None:
    (source,) = parse_data_spec("user/name:en@v1:domain!=code").sources
    rows = RowFilter("domain", ("code",), keeps=False)
    assert source == HubSource("user/name:en@v1:domain!=code", "user/name", "en", "v1", rows)
    weighted = parse_data_spec("user/name:en=0.5,user/other=0.5")
    assert weighted.sources[0] == HubSource("user/name:en", "user/name", "en")
    assert weighted.weights == (0.5, 0.5)


def test_self_has_no_fields() -> None:
    with pytest.raises(UsageError, match="text of `self` has no fields to choose by"):
        parse_data_spec("self:domain=code")


def test_a_filtered_file_that_is_not_there_is_named_alone() -> None:
    with pytest.raises(UsageError, match=r"--data 'gone\.jsonl' was not found"):
        parse_data_spec("gone.jsonl:domain!=code")
