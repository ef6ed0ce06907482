"""A dense model whose neurons serve known words: the right experts of every word are known beforehand."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import torch
from support.tiny import make_model, make_tokenizer

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
