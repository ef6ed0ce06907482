"""Log-likelihoods of next tokens without ever holding the logits of a whole batch.

With V = 49,152 the float32 logits of 8 windows of 1024 tokens are 1.6 GB. So the body of the model runs once over the
batch, and its head over a few hundred positions at a time. What a family does behind the head (Gemma 2 caps logits,
Granite divides them) is the family's own code: the model itself is called with a body that hands out hidden states.

B windows, L tokens, C positions of a chunk, D hidden_size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

CHUNK_POSITIONS = 512


class NextTokens(NamedTuple):
    """How a model predicts each next token."""

    losses_BL: torch.Tensor
    """-log p(token t+1 | tokens 0..t), float32 [B, L-1]."""
    hits_BL: torch.Tensor
    """Whether that token is the likeliest, bool [B, L-1]."""


@torch.no_grad()
def next_tokens(model: PreTrainedModel, ids_BL: torch.Tensor) -> NextTokens:
    """Loss and hit of every next token. Rows may be padded at their right end."""
    body: nn.Module = getattr(model, model.base_model_prefix)
    hidden_BLD = body(input_ids=ids_BL, use_cache=False).last_hidden_state[:, :-1]
    targets_T = ids_BL[:, 1:].flatten()
    losses, hits = [], []
    with _handing_out(model) as stand_in:
        for hidden_CD, targets_C in zip(
            hidden_BLD.flatten(0, 1).split(CHUNK_POSITIONS), targets_T.split(CHUNK_POSITIONS), strict=True
        ):
            stand_in.hidden_1CD = hidden_CD.unsqueeze(0)
            logits_CV = model(input_ids=targets_C.unsqueeze(0), use_cache=False).logits[0]
            losses.append(F.cross_entropy(logits_CV.float(), targets_C, reduction="none"))
            hits.append(logits_CV.argmax(dim=-1) == targets_C)
    rows = ids_BL.shape[0]
    return NextTokens(torch.cat(losses).view(rows, -1), torch.cat(hits).view(rows, -1))


class _StandIn(nn.Module):
    """Takes the place of the body and gives the hidden states that it was told."""

    hidden_1CD: torch.Tensor

    def forward(self, **_: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=self.hidden_1CD)


@contextmanager
def _handing_out(model: PreTrainedModel) -> Iterator[_StandIn]:
    name = model.base_model_prefix
    body, stand_in = getattr(model, name), _StandIn()
    setattr(model, name, stand_in)
    try:
        yield stand_in
    finally:
        setattr(model, name, body)
