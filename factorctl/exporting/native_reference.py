"""What the native checkpoint computes: the logits that an export has to match, and its router logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from factorctl.models.building import factored_ffns
from factorctl.models.factored_ffn import FactoredFFN
from factorctl.models.loading import load


@dataclass(frozen=True)
class NativeReference:
    """Logits per sequence [tokens, vocabulary]; router logits per layer [tokens of all sequences, N]."""

    logits: list[torch.Tensor]
    router_logits: list[torch.Tensor]
    continuations: list[list[int]]


@torch.no_grad()
def native_reference(
    path: Path,
    sequences: Sequence[Sequence[int]],
    *,
    top_k: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    prompts: Sequence[Sequence[int]] = (),
    new_tokens: int = 0,
) -> NativeReference:
    """Run the native checkpoint over `sequences`, and continue `prompts` greedily.

    Args:
        top_k: another number of active experts; all of them for `--to dense`.
        dtype: what to compute in; None keeps the storage dtype.
    """
    model = load(path, top_k=top_k, dtype=dtype, device=device, verify=False)
    ffns = list(factored_ffns(model))
    with _router_logits(ffns) as seen:
        logits = [model(torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in sequences]
        router_logits = [torch.cat(batches) for batches in seen if batches]
    return NativeReference(logits, router_logits, [_greedy(model, prompt, new_tokens) for prompt in prompts])


def _greedy(model: Any, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """The likeliest continuation, without regard to end-of-text."""
    ids = torch.tensor([list(prompt)], device=model.device)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
    )
    return [int(token) for token in output[0, len(prompt) :]]


@contextmanager
def _router_logits(ffns: Sequence[FactoredFFN]) -> Iterator[list[list[torch.Tensor]]]:
    """Collect the router logits of layers that route, batch by batch."""
    seen: list[list[torch.Tensor]] = [[] for _ in ffns]
    with ExitStack() as hooks:
        for ffn, batches in zip(ffns, seen, strict=True):
            if 0 < ffn.top_k < ffn.shape.num_experts:
                handle = ffn.register_forward_pre_hook(_recorder(batches))
                hooks.callback(handle.remove)
        yield seen


def _recorder(batches: list[torch.Tensor]) -> Any:
    def record(ffn: FactoredFFN, inputs: tuple[torch.Tensor, ...]) -> None:
        batches.append(ffn.router_logits(inputs[0].flatten(0, -2)).float().cpu())

    return record
