"""A task with planted experts: the trainer finds the routing that was planted, and does not without PAR.

Every word belongs to one of six groups, one for each pair of four experts. Attention is off, so what an FFN sees is the
word alone; the gates of an expert's neurons open for the groups it serves and close for the others. The right two
experts of a word are known, and with them the dense model is matched exactly.
"""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path

import pytest
import torch
from helpers import LETTERS, SPECIAL, factorize_quietly, make_model, make_tokenizer, weights_only

import factorctl
from factorctl.config import FinetuneConfig
from factorctl.models.building import factored_ffns
from factorctl.pipeline import finetune as pipeline
from factorctl.pipeline.finetune import FinetuneResult, finetune
from factorctl.progress import SilentProgress

N, HIDDEN, NEURONS = 4, 32, 48
PAIRS = list(combinations(range(N), 2))


def plant(directory: Path) -> Path:
    """A dense checkpoint whose neurons 12e .. 12e+11 serve exactly the words of expert e."""
    model = make_model(hidden_size=HIDDEN, intermediate_size=NEURONS, num_hidden_layers=2)
    draw = torch.Generator().manual_seed(1)
    axes = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=draw))[0]  # orthonormal directions, one per column
    served = torch.full((len(model.model.embed_tokens.weight), N), -1.0)
    for word in range(len(served)):
        served[word, list(PAIRS[word % len(PAIRS)])] = 1.0
    with torch.no_grad():
        noise = 0.2 * torch.randn(len(served), HIDDEN, generator=draw)
        model.model.embed_tokens.weight.copy_(served @ axes[:, :N].T + noise)
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.post_attention_layernorm.weight.fill_(1.0)
            owner = torch.arange(NEURONS) // (NEURONS // N)
            block.mlp.gate_proj.weight.copy_(4.0 * axes[:, owner].T)
            block.mlp.up_proj.weight.copy_(torch.randn(NEURONS, HIDDEN, generator=draw) / HIDDEN**0.5)
            # each expert writes into eight directions of its own
            own = (torch.arange(HIDDEN)[:, None] // (HIDDEN // N) == owner).float()
            block.mlp.down_proj.weight.copy_(0.02 * axes @ (own * torch.randn(HIDDEN, NEURONS, generator=draw)))
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


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
