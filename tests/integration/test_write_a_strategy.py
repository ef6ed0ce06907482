"""docs/write-a-strategy.md works as written: its package is taken from the page, installed and run.

Each step runs in its own process, as it would for a reader: this process never sees the package.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "write-a-strategy.md"
FILE_BLOCK = re.compile(r'^```\w+ title="(?P<name>[\w.]+)"\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL)


def files_on_the_page() -> dict[str, str]:
    return {block["name"]: block["text"] for block in FILE_BLOCK.finditer(PAGE.read_text(encoding="utf-8"))}


def run(arguments: Sequence[str | Path], site: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` at the repository's root, with the installed package importable; fails with its output."""
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the page's package, installed by pip without a network."""
    pytest.importorskip("setuptools", minversion="77", reason="building the page's package takes setuptools 77")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name, text in files_on_the_page().items():
        (source / name).write_text(text, encoding="utf-8")
    offline = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    run(["-m", "pip", "install", *offline, "--target", target, source], target)
    return target


def test_the_page_shows_a_small_package() -> None:
    files = files_on_the_page()
    assert files.keys() == {"pyproject.toml", "factorctl_dealt.py", "try_it.py"}
    code = [line for line in files["factorctl_dealt.py"].splitlines() if line.strip()]
    assert len(code) <= 25, "the page promises a strategy that is quick to write"


LIST_STRATEGIES = """
from factorctl.partitions import available
for row in available():
    print(row.name, row.distribution, row.version, row.options, row.error)
"""


def test_the_strategy_is_discovered_beside_the_shipped_ones(site: Path) -> None:
    rows = run(["-c", LIST_STRATEGIES], site).stdout.splitlines()
    assert "dealt factorctl-dealt 0.1.0 ('by',) None" in rows
    assert any(row.startswith("clustered factorctl ") and row.endswith(" None") for row in rows)


@pytest.mark.parametrize(("switch", "listed"), [("", False), ("factorctl-dealt", True)])
def test_the_switch_works_as_the_page_says(site: Path, switch: str, listed: bool) -> None:
    rows = run(["-c", LIST_STRATEGIES], site, FACTORCTL_LOAD_PLUGINS=switch).stdout
    assert ("dealt" in rows) is listed


def test_the_page_s_trial_deals_strong_neurons_to_every_expert(site: Path, tmp_path: Path) -> None:
    script = tmp_path / "try_it.py"
    script.write_text(files_on_the_page()["try_it.py"], encoding="utf-8")
    output = run([script], site).stdout
    means = [float(mean) for mean in re.findall(r"expert \d: mean norm ([\d.]+)", output)]
    assert len(means) == 4
    assert max(means) - min(means) < 0.5
    assert "distribution='factorctl-dealt'" in output


def test_the_strategy_passes_the_contract_suite(site: Path) -> None:
    output = run(
        ["-m", "pytest", "tests/contract/test_strategies.py", "-k", "dealt", "-p", "no:cacheprovider"], site
    ).stdout
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None
    assert int(passed[1]) >= 9, output
    assert "failed" not in output


USE_THE_OPTION = """
import torch
from factorctl.contracts import DenseFFN, LayerStats, PartitionSpec, UsageError
from factorctl.partitions import get_strategy

strategy, _ = get_strategy("dealt")
options = {"by": "importance"}
print(*sorted(strategy.needs(options)))
ffn = DenseFFN(torch.zeros(6, 3), torch.zeros(6, 3), torch.zeros(3, 6))
stats = LayerStats(tokens=1, importance_F=torch.tensor([1.0, 9.0, 3.0, 7.0, 5.0, 4.0]))
print(strategy.partition(ffn, stats, PartitionSpec(2, 0, 0, options)).experts_NH.tolist())
try:
    strategy.needs({"by": "importnce"})
except UsageError as error:
    print(error)
"""


def test_the_option_takes_statistics_and_refuses_a_typing_error(site: Path) -> None:
    assert run(["-c", USE_THE_OPTION], site).stdout.splitlines() == [
        "importance",
        "[[1, 4, 2], [3, 5, 0]]",
        "strategy 'dealt' has no by=importnce",
        "Hint: did you mean 'importance'? Known: importance, norm",
    ]


def test_the_strategy_factorizes_a_model_through_the_command_line(
    site: Path, dense_source: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    """`--strategy dealt`, then with its option, as the page says at its end."""
    command = [
        "-m",
        "factorctl",
        "factorize",
        dense_source(),
        "--experts",
        "2",
        "--strategy",
        "dealt",
        "--format",
        "json",
    ]
    result = json.loads(run([*command, "--router", "random", "--out", tmp_path / "plain"], site).stdout)
    assert (result["strategy"], result["notation"]) == ("dealt", "1R2E1K")
    assert result["identity_error"] <= 1e-5
    data = ["--calibration", text_file, "--calibration-tokens", "512"]
    run([*command, "--option", "by=importance", "--router", "random", *data, "--out", tmp_path / "option"], site)
    manifest = json.loads((tmp_path / "option" / "factorctl.json").read_text())
    assert manifest["details"]["strategy"] == {
        "name": "dealt",
        "version": "0.1.0",
        "reference": "https://example.org/dealt",
        "distribution": "factorctl-dealt",
        "options": {"by": "importance"},
    }
    assert manifest["details"]["calibration"]["tokens"] == 512
    assert "dealt" in run(["-m", "factorctl", "plugins"], site).stdout
