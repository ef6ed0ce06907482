"""Strategies are found through entry points, one fault stops one strategy, and errors name the package at fault."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from factorctl.contracts import PARTITION_ENTRY_POINTS, PartitionSpec, PartitionStrategy
from factorctl.errors import ExitCode, UsageError
from factorctl.partitions import LOAD_PLUGINS_VARIABLE, BrokenStrategyError, available, contract_faults, get_strategy

SHIPPED = {"clustered", "contiguous", "permuted", "routed"}

WORKING = """
    class Strategy:
        name = "{name}"
        reference = "https://example.org"
        option_names = frozenset({{"order", "by"}})
        def needs(self, options): return frozenset()
        def partition(self, ffn, stats, spec): ...
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """install(distribution, name, code): what pip would leave behind for a package with one strategy."""
    monkeypatch.delenv(LOAD_PLUGINS_VARIABLE, raising=False)

    def write(distribution: str, name: str, code: str = WORKING, version: str = "1.2") -> None:
        site = tmp_path / distribution
        module = distribution.replace("-", "_").replace(".", "_").lower()
        metadata = site / f"{module}-{version}.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (metadata / "entry_points.txt").write_text(f"[{PARTITION_ENTRY_POINTS}]\n{name} = {module}:Strategy\n")
        (site / f"{module}.py").write_text(dedent(code).format(name=name))
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, module, raising=False)

    return write


def test_the_shipped_strategies_work_and_say_where_they_are_from() -> None:
    rows = {row.name: row for row in available()}
    assert rows.keys() >= SHIPPED
    for name in SHIPPED:
        assert rows[name].error is None
        assert rows[name].distribution == "factorctl"
        assert "arxiv.org" in (rows[name].reference or "")
    assert rows["clustered"].options == ("by", "iterations")


def test_get_strategy_returns_the_strategy_and_what_the_manifest_records(install: Install) -> None:
    install("my-plugin", "mine")
    strategy, provenance = get_strategy("mine")
    assert isinstance(strategy, PartitionStrategy)
    assert (provenance.name, provenance.version, provenance.distribution) == ("mine", "1.2", "my-plugin")
    assert provenance.reference == "https://example.org"


def test_an_unknown_name_gets_the_closest_one() -> None:
    with pytest.raises(UsageError, match="no strategy is called 'clusterd'") as caught:
        get_strategy("clusterd")
    assert "did you mean 'clustered'?" in str(caught.value)
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("import not_there_at_all", "ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("raise SystemExit('bye')", "SystemExit: bye"),
        ("other = 1", "AttributeError"),
        ("def Strategy(): raise ValueError('no licence')", "ValueError: no licence"),
        ("def Strategy(): return object()", "needs() is missing; partition() is missing"),
    ],
)
def test_a_broken_plugin_is_named_with_its_fault_and_the_others_work(install: Install, code: str, fault: str) -> None:
    install("bad-plugin", "bad", code)
    install("good-plugin", "good")
    rows = {row.name: row for row in available()}
    assert "strategy 'bad' of bad-plugin 1.2" in (rows["bad"].error or "")
    assert fault in (rows["bad"].error or "")
    assert all(rows[name].error is None for name in {*SHIPPED, "good"})
    with pytest.raises(BrokenStrategyError) as caught:
        get_strategy("bad")
    assert fault in caught.value.message
    assert "uninstall bad-plugin" in (caught.value.hint or "")
    get_strategy("good")


def test_a_broken_plugin_keeps_its_cause(install: Install) -> None:
    install("bad-plugin", "bad", "raise RuntimeError('deep down')")
    with pytest.raises(BrokenStrategyError) as caught:
        get_strategy("bad")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_only_the_strategy_asked_for_is_imported(install: Install) -> None:
    install("bad-plugin", "bad", "raise RuntimeError('imported')")
    get_strategy("contiguous")
    assert "bad_plugin" not in sys.modules


def test_two_packages_with_one_name_are_both_named(install: Install) -> None:
    install("first-plugin", "twin")
    install("second-plugin", "twin", version="3.0")
    with pytest.raises(UsageError, match=r"'twin' is provided by first-plugin 1\.2 and second-plugin 3\.0") as caught:
        get_strategy("twin")
    assert LOAD_PLUGINS_VARIABLE in (caught.value.hint or "")
    assert [row.error is None for row in available() if row.name == "twin"] == [False, False]
    get_strategy("contiguous")


def test_a_plugin_cannot_take_a_shipped_name_quietly(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("sly-plugin", "clustered")
    with pytest.raises(UsageError, match=r"provided by factorctl .* and sly-plugin 1\.2"):
        get_strategy("clustered")
    monkeypatch.setenv(LOAD_PLUGINS_VARIABLE, "")
    assert get_strategy("clustered")[1].distribution == "factorctl"


def test_the_switch_leaves_only_shipped_strategies_when_empty(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("my-plugin", "mine")
    monkeypatch.setenv(LOAD_PLUGINS_VARIABLE, "")
    assert {row.distribution for row in available()} == {"factorctl"}
    with pytest.raises(UsageError, match="'mine' is switched off by FACTORCTL_LOAD_PLUGINS") as caught:
        get_strategy("mine")
    assert "my-plugin" in (caught.value.hint or "")


def test_the_switch_lets_named_packages_in_however_they_are_spelt(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("My.Plugin", "mine")
    install("other-plugin", "other")
    monkeypatch.setenv(LOAD_PLUGINS_VARIABLE, " my_plugin ,")
    assert {row.name for row in available()} >= {*SHIPPED, "mine"}
    assert "other" not in {row.name for row in available()}


def test_the_switch_refuses_a_package_without_strategies(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("my-plugin", "mine")
    monkeypatch.setenv(LOAD_PLUGINS_VARIABLE, "my-plugn")
    with pytest.raises(UsageError, match="names 'my-plugn', which provides no strategy") as caught:
        available()
    assert "did you mean 'my-plugin'?" in (caught.value.hint or "")


class Incomplete:
    name = "other"
    reference = " "
    option_names = "by"
    partition = None

    def needs(self, options: object) -> None: ...


def test_everything_that_is_missing_is_said_at_once() -> None:
    assert contract_faults(Incomplete(), "mine") == [
        "name is 'other', but its entry point calls it 'mine'",
        "reference must be a paper or URL",
        "option_names must be a frozenset of str",
        "partition() is missing",
    ]


def test_listing_strategies_does_not_wait_for_the_transport_solver() -> None:
    code = "import sys; from factorctl.partitions import available; available(); sys.exit('ot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_strategies_take_no_option_they_do_not_name(name: str) -> None:
    from factorctl.contracts import check_option_names

    strategy, _ = get_strategy(name)
    with pytest.raises(UsageError, match=f"strategy '{name}' has no option 'colour'"):
        check_option_names(strategy, PartitionSpec(2, 0, 0, {"colour": "red"}).options)
