"""Experts chosen by what sort of text it is: once per domain, the same for every token of a text.

Our reading of KnowledgeFactor (Yang et al., arXiv 2207.03337) for a language model. There a network is cut into a
common part, which every task uses, and one part per task; which task an input belongs to is known. Here the shared
neurons are the common part, a task is a domain of text, and its own part are the K experts that serve its tokens best.
No router looks at a token, and the chosen experts count evenly.

A text that names no domain belongs to the one whose texts it is most like: by the mean of its tokens' embeddings, less
that of all texts, the centre at the least angle. The mean of all tokens is side information that a router does not
have: it includes tokens that are still to be predicted.

B rows, L tokens of a row, T = B*L, D hidden_size, M domains, N num_experts, K top_k, P texts in a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from factorctl.errors import UsageError
from factorctl.ffn.layer import FactoredFFN


class Domains(nn.Module):
    """Knows the domains, and which of them every token now in the model belongs to.

    Buffers, which are also the tensors on disk:
        mean [D]: of all texts' mean embeddings.
        centres [M, D]: of every domain's texts less that mean, at length 1.
    """

    mean: torch.Tensor
    centres: torch.Tensor

    def __init__(self, names: Sequence[str], mean_D: torch.Tensor, centres_MD: torch.Tensor) -> None:
        super().__init__()
        self.names = tuple(names)
        self.register_buffer("mean", mean_D)
        self.register_buffer("centres", centres_MD)
        self.named: Sequence[str | None] | None = None
        """Domains of the next batch's rows, where they are known; one that is unknown here is found like any other."""
        self.of_token_T = torch.zeros(0, dtype=torch.long)
        self.of_row_B = torch.zeros(0, dtype=torch.long)

    def name_rows(self, named: Sequence[str | None]) -> None:
        """Say of what domain the rows of the next batch are, where that is known."""
        self.named = named

    def nearest(self, vectors_PD: torch.Tensor) -> torch.Tensor:
        """The domain of texts by their mean embeddings, [P]."""
        return (F.normalize(vectors_PD - self.mean, dim=-1) @ self.centres.T.to(vectors_PD.dtype)).argmax(dim=-1)

    def look(self, model: nn.Module, _: tuple[Any, ...], inputs: Mapping[str, Any]) -> None:
        """Note the domain of every token that the body of a model is called with: a hook in front of it."""
        ids_BL = inputs.get("input_ids")
        if ids_BL is None:
            raise UsageError("a model that chooses experts by domain needs token ids, not embeddings", "give input_ids")
        cache = inputs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            of_token_BL = self._of_tokens(model, ids_BL, inputs)
            for row, name in enumerate(self.named or ()):
                if name in self.names:
                    of_token_BL[row] = self.names.index(name)
            self.named, self.of_row_B = None, of_token_BL[:, -1]
        else:
            of_token_BL = self.of_row_B.unsqueeze(1).expand(ids_BL.shape)
        self.of_token_T = of_token_BL.flatten()

    @torch.no_grad()
    def _of_tokens(self, model: nn.Module, ids_BL: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
        embedded_TD = model.get_input_embeddings()(ids_BL).flatten(0, 1).float()  # type: ignore[operator]
        text_T = texts_of(ids_BL, inputs.get("position_ids")).flatten()
        counts_T = text_tokens(ids_BL, inputs.get("attention_mask")).flatten().float()
        size = int(text_T[-1]) + 1
        sums_PD = embedded_TD.new_zeros(size, embedded_TD.shape[1])
        sums_PD.index_add_(0, text_T, embedded_TD * counts_T.unsqueeze(1))
        counts_P = counts_T.new_zeros(size).index_add_(0, text_T, counts_T).clamp_min(1)
        return self.nearest(sums_PD / counts_P.unsqueeze(1))[text_T].view(ids_BL.shape)


def texts_of(ids_BL: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    """A number for every text of a batch, ascending, by token: rows are texts, cut where positions begin anew."""
    begins_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
    begins_BL[:, 0] = True
    if position_ids is not None and position_ids.dim() == 2:
        begins_BL |= position_ids == 0
    return begins_BL.flatten().cumsum(0).view(ids_BL.shape) - 1


def text_tokens(ids_BL: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Which tokens are text, by the mask or else by what stands at the end of each row: one token over and over."""
    if mask is not None and mask.dim() == 2 and mask.shape == ids_BL.shape:
        return mask.bool()
    changes_BL = (ids_BL != ids_BL[:, -1:]).long()
    behind_BL = changes_BL.flip(1).cumsum(1).flip(1)  # tokens from here on that are not the padding
    whole_B1 = (changes_BL.sum(1, keepdim=True) == 0).long()
    return (behind_BL + whole_B1) > 0


def domains_of(model: PreTrainedModel) -> Domains | None:
    """What a model knows of domains; None where it does not choose by them."""
    found = getattr(getattr(model, model.base_model_prefix), "domains", None)
    return found if isinstance(found, Domains) else None


class DomainChoice:
    """The experts of every token's domain, [T, K]: takes the router's place in a factored FFN."""

    def __init__(self, domains: Domains, experts_MK: torch.Tensor) -> None:
        self.domains, self.experts_MK = domains, experts_MK

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.experts_MK[self.domains.of_token_T].long()


def choose_by_domain(
    model: PreTrainedModel, domains: Domains, experts_LMK: Sequence[torch.Tensor], ffns: Iterable[FactoredFFN]
) -> RemovableHandle:
    """Let FFNs of `model` take the experts of their tokens' domain, evenly weighted, until the hook is removed."""
    for ffn, experts_MK in zip(ffns, experts_LMK, strict=True):
        ffn.chooser = DomainChoice(domains, experts_MK)
        ffn.router.data.zero_()
    body: nn.Module = getattr(model, model.base_model_prefix)
    return body.register_forward_pre_hook(domains.look, with_kwargs=True)
