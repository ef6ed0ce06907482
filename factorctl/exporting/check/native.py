"""What the native checkpoint computes, in float64 and with one layer's weights in memory: what an export has to match.

Two ways to run it. As it is served, K experts work for a token. With *every expert on* a token's output is the
softmax over all N logits times all experts, at the scale of K: a smooth function of every weight, in which no decision
can fall the other way. It is what a stock engine computes of an export that is told to use N experts.

B sequences padded to L tokens, T tokens of all sequences, N num_experts, K top_k, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from factorctl.ffn.layer import FactoredFFN
from factorctl.ffn.routing import Routing, gate_weights
from factorctl.ffn.spec import FactoredSpec
from factorctl.models.building import decoder_layers, empty_factored_model, factored_ffns
from factorctl.models.families import DenseModel, ReadTensor, layer_prefix
from factorctl.models.filling import expected_tensors
from factorctl.models.hooks import watched

DTYPE = torch.float64


@dataclass(frozen=True)
class LayerRouting:
    """How one layer routes the tokens."""

    logits_TN: torch.Tensor
    ids_TK: torch.Tensor
    """The experts that the router chooses, whichever ran."""
    unit_noise_T: torch.Tensor
    """Standard deviation of the logits' differences if the layer's input were off, in a random direction, by its own
    size: ||x|| times the rms over the experts of ||w_e - mean w||, over sqrt(D)."""


@dataclass(frozen=True)
class NativeRun:
    """Logits per sequence [tokens, vocabulary]; the routing of each layer that routes, tokens of all sequences."""

    logits: list[torch.Tensor]
    routing: list[LayerRouting]


@dataclass(frozen=True)
class Question:
    """What native model and export are both asked."""

    sequences: Sequence[Sequence[int]]
    positions: Sequence[Sequence[int]]
    """Where each token stands: a sequence may be spread over the context, so that RoPE is seen far out too."""


def plain(sequences: Sequence[Sequence[int]]) -> Question:
    """Sequences that begin at position 0 and have no gaps."""
    return Question(sequences, [range(len(ids)) for ids in sequences])


@torch.no_grad()
def native_run(
    dense: DenseModel,
    spec: FactoredSpec,
    read: ReadTensor,
    question: Question,
    *,
    every_expert: bool = False,
    by_sigmoids: bool = False,
    choices: Sequence[LayerRouting] | None = None,
    device: torch.device | str = "cpu",
) -> NativeRun:
    """Run the native model over all sequences at once, each layer's weights read when it is their turn.

    Args:
        read: tensors by their native names; not necessarily the checkpoint's own values.
        by_sigmoids: gates are the sigmoids of the logits over their sum, as in GLM-4-MoE, instead of a softmax.
        choices: of another run over the same question, whose experts are taken instead of the router's.
    """
    model = _reading_layer_by_layer(dense, spec, read, device)
    ids_BL, real_BL = _padded(question.sequences, device)
    positions_BL, _ = _padded(question.positions, device)
    ffns = [ffn for ffn in factored_ffns(model) if ffn.routes]
    for index, ffn in enumerate(ffns):
        if every_expert:
            _turn_on_every_expert(ffn)
        elif choices is not None:
            _follow(ffn, choices[index], real_BL)
        if by_sigmoids:
            _weigh_by_sigmoids(ffn)
    with _routing_of(ffns, real_BL) as routing:
        # A mask is given because transformers takes gaps between positions for boundaries of packed sequences else.
        mask_BL = torch.ones_like(ids_BL)
        logits_BLV = (
            model(ids_BL, attention_mask=mask_BL, position_ids=positions_BL, use_cache=False).logits.float().cpu()
        )
    return NativeRun([row[: len(ids)] for row, ids in zip(logits_BLV, question.sequences, strict=True)], routing)


def _padded(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows [B, L], which entries are real). Behind its end a causal model's tokens change nothing before it."""
    padded = pad_sequence([torch.tensor(list(row)) for row in rows], batch_first=True, padding_value=-1)
    return padded.clamp_min(0).to(device), (padded >= 0).to(device)


def _reading_layer_by_layer(
    dense: DenseModel, spec: FactoredSpec, read: ReadTensor, device: torch.device | str
) -> PreTrainedModel:
    """The model with embeddings, norm and head in memory; a decoder layer's tensors are there while it runs."""
    model = empty_factored_model(dense, spec)
    names = expected_tensors(model)

    def value(name: str) -> torch.Tensor:
        tensor = read(name)
        return tensor.to(device=device, dtype=DTYPE if tensor.is_floating_point() else None)

    rest = {name: value(name) for name in names if not name.startswith("model.layers.")}
    model.load_state_dict(rest, strict=False, assign=True)
    model.tie_weights()
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
    for index, layer in enumerate(decoder_layers(model)):
        prefix = layer_prefix(index)
        own = [name for name in names if name.startswith(prefix)]
        layer.register_forward_pre_hook(_loader({name.removeprefix(prefix): name for name in own}, value))
        layer.register_forward_hook(_unloader([name.removeprefix(prefix) for name in own]))
    for ffn in factored_ffns(model):
        ffn.path = "masked"
    model.eval()
    return model


def _loader(own: dict[str, str], value: ReadTensor) -> Any:
    def load(layer: nn.Module, _: Any) -> None:
        layer.load_state_dict({short: value(name) for short, name in own.items()}, strict=False, assign=True)

    return load


def _unloader(own: Sequence[str]) -> Any:
    def unload(layer: nn.Module, *_: Any) -> None:
        state = layer.state_dict()
        layer.load_state_dict({short: state[short].to("meta") for short in own}, strict=False, assign=True)

    return unload


def _turn_on_every_expert(ffn: FactoredFFN) -> None:
    """All N in the softmax, and still s = a*K."""
    n = ffn.shape.num_experts
    ffn.scale_a *= ffn.top_k / n
    ffn.chooser = lambda x_TD: torch.arange(n, device=x_TD.device).expand(len(x_TD), -1)


def _weigh_by_sigmoids(ffn: FactoredFFN) -> None:
    """Sigmoids over their sum are the softmax of the sigmoids' logarithms."""

    def route(x_TD: torch.Tensor) -> Routing:
        logits_TN = ffn.router_logits(x_TD)
        ids_TK = logits_TN.topk(ffn.top_k, dim=-1).indices if ffn.chooser is None else ffn.chooser(x_TD)
        chosen_TK = nn.functional.logsigmoid(logits_TN).gather(1, ids_TK)
        return Routing(ids_TK, gate_weights(chosen_TK, gate=ffn.gate, scale_a=ffn.scale_a))

    vars(ffn)["route"] = route


def _follow(ffn: FactoredFFN, choice: LayerRouting, real_BL: torch.Tensor) -> None:
    """Take the experts of another run; padding takes the first K."""
    ids_PK = torch.arange(ffn.top_k, device=real_BL.device).repeat(real_BL.numel(), 1)
    ids_PK[real_BL.flatten()] = choice.ids_TK.to(real_BL.device)
    ffn.chooser = lambda _: ids_PK


@contextmanager
def _routing_of(ffns: Sequence[FactoredFFN], real_BL: torch.Tensor) -> Iterator[list[LayerRouting]]:
    """Collect how each layer routes the tokens that are no padding."""
    seen: list[LayerRouting] = []

    def record(ffn: FactoredFFN, inputs: tuple[torch.Tensor, ...]) -> None:
        x_TD, router_ND = inputs[0][real_BL], ffn.router
        logits_TN = ffn.router_logits(x_TD)
        ids_TK = logits_TN.topk(ffn.top_k, dim=-1).indices
        spread = (router_ND - router_ND.mean(0)).square().sum(-1).mean().sqrt()
        noise_T = x_TD.norm(dim=-1) * spread / router_ND.shape[1] ** 0.5
        seen.append(LayerRouting(logits_TN.cpu(), ids_TK.cpu(), noise_T.cpu()))

    with watched(ffns, before=record):
        yield seen
