"""The path of README, `--help` and the card, walked to its end on the real demo model: no step of it may be refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command_line import cli

from factorctl.checkpoint.sources import resolve
from factorctl.errors import ExitCode, ResourceError
from factorctl.pipeline.recipe.demo import write_manual
from factorctl.progress import SilentProgress

pytestmark = pytest.mark.slow

SPLITS = {"4 experts": ["--experts", 4, "--top-k", 2], "the default split": []}
TRAINED = "4 experts, finetuned"
TARGETS = {
    "hf": [],
    "gguf f16": ["--to", "gguf", "--quant", "f16"],
    "gguf q8_0": ["--to", "gguf", "--quant", "q8_0"],
    "dense": ["--to", "dense"],
}
FINETUNING = ["--data", "train.jsonl", "--tokens", 2048, "--block-length", 128, "--batch-tokens", 512]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of the demo, made when first asked for, in the user's own cache: the model is 100 MB to fetch."""
    workspace = tmp_path_factory.mktemp("walk")
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            out = workspace / name.replace(" ", "-").replace(",", "")
            if name == TRAINED:
                command = ["finetune", make("4 experts"), *FINETUNING, "--heldout-tokens", 256]
            else:
                command = ["factorize", "demo", *SPLITS[name], "--calibration-tokens", 8192]
            made[name] = Path(result_of(*command, "--out", out)["checkpoint"])
        return made[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FACTORCTL_CACHE")
        patch.chdir(workspace)
        from factorctl.files.cache import cache_directory

        try:
            resolve("demo", revision=None, cache=cache_directory(), progress=SilentProgress())
        except ResourceError as error:
            pytest.skip(f"the demo model cannot be fetched here: {error.message}")
        write_manual(workspace)
        return make


@pytest.fixture(autouse=True)
def _users_cache(monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[[str], Path]) -> None:
    monkeypatch.delenv("FACTORCTL_CACHE")


def result_of(*words: object) -> dict[str, Any]:
    outcome = cli(*words, "--format", "json")
    assert outcome.code == ExitCode.DONE, outcome.stderr
    return outcome.json


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [*SPLITS, TRAINED])
def test_every_target_is_proven_and_published(
    name: str, target: str, checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint("4 experts").parent)
    result = result_of("export", checkpoint(name), *TARGETS[target], "--out", tmp_path / "out")
    if target in ("hf", "dense"):
        assert result["top1_agreement"] == 1
        assert result["kl"] < 1e-6
    if target != "dense":
        assert result["all_experts_error"] < (1e-4 if target == "hf" else 5e-2)
    if target == "gguf q8_0":
        assert result["kl_same_experts"] < 0.05
    assert cli("verify", tmp_path / "out").code == ExitCode.DONE
    assert "## Compared with the native checkpoint" in (tmp_path / "out" / "README.md").read_text()
