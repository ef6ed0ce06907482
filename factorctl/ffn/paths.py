"""Ways to compute a factored FFN. All give the same function; they differ in what they touch.

| path      | runs                                             | meant for                                 |
|-----------|--------------------------------------------------|-------------------------------------------|
| `kernel`  | all in one call of our own, routing included     | CPU, without gradient: few to many tokens |
| `dense`   | every expert with unit weight, two GEMMs         | K = N                                     |
| `masked`  | the dense GEMMs, unchosen neurons set to zero    | GPU; few tokens on a CPU; the oracle      |
| `loop`    | one small FFN per expert over its own tokens     | CPU, one token or a few                   |
| `grouped` | the same in two grouped GEMMs                    | many tokens; training                     |
| `slot`    | the weights of each (token, expert) pair, gathered | GPU, few of many experts                |

`kernel` is `factorctl.ffn.kernel.cpu`; where no compiler made it, and under autograd, the others serve.
`loop` reads the routing on the host and therefore stays on CPUs; the rest never synchronise with a GPU. Weights are
read through views of one expert-contiguous copy. transformers' experts functions `batched_mm` and `grouped_mm` hold
the ideas of `slot` and `grouped`, but know no shared prefix and count on module attributes that change between
releases; exported checkpoints run on them.

T tokens, D hidden_size, F intermediate_size, N num_experts, H expert_size, S shared_size, K top_k,
G = 2H rows of a gate|up pair, R = N*H routed neurons, P = T*K (token, expert) pairs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch.nn import functional as F

from factorctl.ffn.few_token_linear import linear
from factorctl.ffn.routing import Routing, group_by_expert, scatter_weights

Activation = Callable[[torch.Tensor], torch.Tensor]
PathName = Literal["kernel", "dense", "masked", "loop", "grouped", "slot"]

Step = tuple[int | None, PathName]
"""Up to how many tokens, None for however many, and the path that serves them. A plain pair: torch.compile in torch
2.11 makes no constant of a named tuple."""
Steps = tuple[Step, ...]
"""A ladder: the last step has no limit."""

GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What `F.grouped_mm` multiplies."""


class ExpertWeights(NamedTuple):
    """The routed experts' weights as views into one expert-contiguous copy."""

    gate_up_NGD: torch.Tensor
    down_DR: torch.Tensor
    """Routed columns of the down-projection, R = N*H; its rows keep the stride of the whole matrix."""
    gate_up_bias_NG: torch.Tensor | None
    activation: Activation

    @property
    def num_experts(self) -> int:
        return self.gate_up_NGD.shape[0]

    @property
    def expert_size(self) -> int:
        return self.gate_up_NGD.shape[1] // 2

    @property
    def down_NDH(self) -> torch.Tensor:
        """The down-projection of each expert: a strided view, nothing is copied."""
        return self.down_DR.view(-1, self.num_experts, self.expert_size).transpose(0, 1)

    def only(self, expert: int) -> ExpertWeights:
        """One expert, which is a dense FFN."""
        bias, size = self.gate_up_bias_NG, self.expert_size
        return ExpertWeights(
            self.gate_up_NGD[expert : expert + 1],
            self.down_DR[:, expert * size : (expert + 1) * size],
            None if bias is None else bias[expert : expert + 1],
            self.activation,
        )


class SharedHidden(NamedTuple):
    """The shared neurons' activations and the down-projection that they are a prefix of."""

    hidden_TS: torch.Tensor
    down_DF: torch.Tensor

    @property
    def size(self) -> int:
        return self.hidden_TS.shape[1]

    def output_TD(self) -> torch.Tensor:
        return linear(self.hidden_TS, self.down_DF[:, : self.size])


def gated(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """act(gate) * up for a trailing gate|up dimension of 2H."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate) * up


def hidden_of_all(x_TD: torch.Tensor, experts: ExpertWeights) -> torch.Tensor:
    """act(gate x) * (up x) of every routed neuron, [T, N, H]: one GEMM over all experts."""
    bias = experts.gate_up_bias_NG
    products = linear(x_TD, experts.gate_up_NGD.flatten(0, 1), None if bias is None else bias.flatten())
    return gated(products.view(-1, experts.num_experts, 2 * experts.expert_size), experts.activation)


def masked(
    x_TD: torch.Tensor, experts: ExpertWeights, routing: Routing, shared: SharedHidden | None = None
) -> torch.Tensor:
    """Dense GEMMs with the neurons of unchosen experts set to zero: exact, free of host synchronisation.

    Executes the dense FLOPs whatever K is: the floor of every other path and their oracle.
    """
    hidden_TNH = hidden_of_all(x_TD, experts)
    weights_TN = scatter_weights(routing, experts.num_experts).to(hidden_TNH.dtype)
    hidden_TR = (hidden_TNH * weights_TN.unsqueeze(-1)).flatten(1)
    if shared is None:
        return linear(hidden_TR, experts.down_DR)
    return linear(torch.cat([shared.hidden_TS, hidden_TR], dim=1), shared.down_DF)


def loop(
    x_TD: torch.Tensor, experts: ExpertWeights, routing: Routing, shared: SharedHidden | None = None
) -> torch.Tensor:
    """One small FFN after another over the tokens that chose it: for few tokens on a CPU, whose cores share a product.

    Reads the routing on the host, and would build a gradient of the full size for every expert.
    """
    y_TD = torch.zeros_like(x_TD) if shared is None else shared.output_TD()
    pairs: defaultdict[int, list[int]] = defaultdict(list)
    for pair, expert in enumerate(routing.ids_TK.flatten().tolist()):
        pairs[expert].append(pair)
    weights_P, top_k = routing.weights_TK.flatten().to(experts.down_DR.dtype), routing.ids_TK.shape[1]
    for expert in sorted(pairs):
        one = experts.only(expert)
        if len(x_TD) == 1:  # decoding: every call shows next to one token's products
            y_TD = y_TD + _one_expert(x_TD, one, weights_P[pairs[expert][0]])
            continue
        pairs_E = torch.tensor(pairs[expert], device=x_TD.device)
        tokens_E = pairs_E // top_k
        own_ED = _one_expert(x_TD.index_select(0, tokens_E), one, weights_P[pairs_E])
        y_TD = y_TD.index_add(0, tokens_E, own_ED.to(y_TD.dtype))
    return y_TD


def _one_expert(x_ED: torch.Tensor, one: ExpertWeights, weights_E: torch.Tensor) -> torch.Tensor:
    return linear(hidden_of_all(x_ED, one).flatten(1) * weights_E.unsqueeze(-1), one.down_DR)


def grouped(
    x_TD: torch.Tensor, experts: ExpertWeights, routing: Routing, shared: SharedHidden | None = None
) -> torch.Tensor:
    """Tokens sorted by expert, then two grouped GEMMs, without host synchronisation: see `serves_grouped`."""
    groups = group_by_expert(routing.ids_TK)
    boundaries = torch.arange(experts.num_experts, device=x_TD.device)
    ends_N = torch.searchsorted(groups.expert_P, boundaries, right=True, out_int32=True)
    x_PD = x_TD.index_select(0, groups.token_P).to(experts.gate_up_NGD.dtype)
    gate_up_PG = _grouped_product(x_PD, experts.gate_up_NGD, ends_N)
    if experts.gate_up_bias_NG is not None:
        gate_up_PG = gate_up_PG + experts.gate_up_bias_NG[groups.expert_P]
    weights_P = routing.weights_TK.flatten().index_select(0, groups.order_P)
    hidden_PH = gated(gate_up_PG, experts.activation) * weights_P.unsqueeze(1).to(gate_up_PG.dtype)
    y_PD = _grouped_product(hidden_PH, experts.down_NDH, ends_N)
    return _in_token_order(y_PD, groups.order_P, routing, shared)


def _grouped_product(x_PI: torch.Tensor, weight_NOI: torch.Tensor, ends_N: torch.Tensor) -> torch.Tensor:
    """x W^T with each row's own expert, [P, O]. torch traces it in bfloat16 only: other graphs are cut in two here."""
    if x_PI.dtype == torch.bfloat16:
        return F.grouped_mm(x_PI, weight_NOI.transpose(1, 2), offs=ends_N)
    y_PO: torch.Tensor = _untraced_grouped_mm(x_PI, weight_NOI.transpose(1, 2), ends_N)
    return y_PO


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _untraced_grouped_mm(x_PI: torch.Tensor, weight_NIO: torch.Tensor, ends_N: torch.Tensor) -> torch.Tensor:
    y_PO: torch.Tensor = F.grouped_mm(x_PI, weight_NIO, offs=ends_N)
    return y_PO


def can_group(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether `F.grouped_mm` takes matrices whose rows and offsets have these sizes: 16-byte alignment."""
    return all(size * dtype.itemsize % 16 == 0 for size in sizes)


def serves_grouped(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether `grouped` runs on a layer of this dtype and these sizes."""
    return dtype in GROUPED_DTYPES and can_group(dtype, *sizes)


def slot(
    x_TD: torch.Tensor, experts: ExpertWeights, routing: Routing, shared: SharedHidden | None = None
) -> torch.Tensor:
    """A matrix-vector product per (token, expert) pair with gathered weights: for T*K far below N on a GPU.

    Eager, the gather copies the experts' weights. Inductor fuses it into the products only with
    `coordinate_descent_tuning`, which `max-autotune` sets and `reduce-overhead` does not. UNTIMED: compiled.
    """
    ids_P = routing.ids_TK.flatten()
    x_PD = x_TD.repeat_interleave(routing.ids_TK.shape[1], dim=0)
    gate_up_PG = torch.bmm(experts.gate_up_NGD[ids_P], x_PD.unsqueeze(-1)).squeeze(-1)
    if experts.gate_up_bias_NG is not None:
        gate_up_PG = gate_up_PG + experts.gate_up_bias_NG[ids_P]
    hidden_PH = gated(gate_up_PG, experts.activation) * routing.weights_TK.reshape(-1, 1).to(gate_up_PG.dtype)
    # A token's experts side by side, [T, K*H] and [T, D, K*H], so that one sum runs over all of its neurons.
    hidden_TA = hidden_PH.view(*routing.ids_TK.shape, experts.expert_size).flatten(1)
    down_TDA = experts.down_NDH[routing.ids_TK].transpose(1, 2).flatten(2)
    y_TD = torch.bmm(down_TDA, hidden_TA.unsqueeze(-1)).squeeze(-1)
    return y_TD if shared is None else y_TD + shared.output_TD()


def _in_token_order(
    y_PD: torch.Tensor, order_P: torch.Tensor, routing: Routing, shared: SharedHidden | None
) -> torch.Tensor:
    """Outputs of pairs sorted by expert, summed up token by token.

    By a gather: index_add would add in an order that changes from run to run.
    """
    positions_P = torch.arange(len(order_P), device=order_P.device)
    place_P = torch.empty_like(order_P).scatter_(0, order_P, positions_P)  # what argsort would give, without sorting
    y_TKD = y_PD.index_select(0, place_P).view(*routing.ids_TK.shape, y_PD.shape[1])
    y_TD = y_TKD.sum(1) if y_TKD.shape[1] > 1 else y_TKD[:, 0]
    return y_TD if shared is None else y_TD + shared.output_TD()


RoutedPath = Callable[[torch.Tensor, ExpertWeights, Routing, SharedHidden | None], torch.Tensor]
ROUTED_PATHS: dict[PathName, RoutedPath] = {
    "masked": masked,
    "grouped": grouped,
    "loop": loop,
    "slot": slot,
}
