"""A task with planted experts: the trainer finds the routing that was planted, and does not without PAR.

Every word belongs to one of six groups, one for each pair of four experts. Attention is off, so what an FFN sees is the
word alone; the gates of an expert's neurons open for the groups it serves and close for the others. The right two
experts of a word are known, and with them the dense model is matched exactly.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from support.planted import PAIRS, plant
from support.tiny import LETTERS, SPECIAL, factorize_quietly, weights_only

import factorctl
from factorctl.config.finetune import FinetuneConfig
from factorctl.models.building import factored_ffns
from factorctl.pipeline.finetune import run as pipeline
from factorctl.pipeline.finetune.run import FinetuneResult, finetune
from factorctl.progress import SilentProgress


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("planted")
    factorize_quietly(weights_only(plant(root / "dense"), root / "base", top_k=2))
    draw = random.Random(0)
    texts = ["".join(draw.choices(LETTERS, k=100)) for _ in range(120)]
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return root / "base", root / "text.jsonl"


def train(planted: tuple[Path, Path], out: Path, tokens: int, par: float) -> FinetuneResult:
    base, text = planted
    config = FinetuneConfig(
        tokens=tokens,
        checkpoint=base,
        data=str(text),
        block_length=64,
        batch_tokens=256,
        heldout_tokens=512,
        loss_weights={"par": par, "balance": 0.0},
        device="cpu",
        out=out,
    )
    return finetune(config, SilentProgress())


@torch.no_grad()
def recovered(checkpoint: str) -> float:
    """Share of (layer, letter, planted expert) that the routers choose."""
    model = factorctl.load(checkpoint)
    ids = torch.arange(len(SPECIAL), len(SPECIAL) + len(LETTERS))
    hits = []
    for ffn in factored_ffns(model):
        ffn.register_forward_pre_hook(
            lambda ffn, x: hits.extend(
                len(set(chosen) & set(PAIRS[word % len(PAIRS)])) / 2
                for word, chosen in zip(ids.tolist(), ffn.route(x[0].flatten(0, -2)).ids_TK.tolist(), strict=True)
            )
        )
    model(ids[:, None])
    return sum(hits) / len(hits)


def test_the_planted_routing_is_recovered_with_par_alone(
    planted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "draw_training", lambda *_: None)
    with_par = train(planted, tmp_path / "with", 8192, par=1.0)
    without = train(planted, tmp_path / "without", 8192, par=0.0)
    assert with_par.router_agreement_before < 0.8
    assert with_par.router_agreement > 0.95
    assert recovered(with_par.checkpoint) > 0.95
    assert with_par.dead_experts == []

    assert without.router_agreement < 0.9, "a gate over chosen experts tells nothing of the others"
