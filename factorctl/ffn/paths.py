"""Ways to compute a factored FFN. All give the same function; they differ in what they touch.

| path      | runs                                             | meant for                                |
|-----------|--------------------------------------------------|------------------------------------------|
| `kernel`  | all in one compiled call, routing included       | CPU, without gradient: few to many tokens |
| `dense`   | every expert with unit weight, two GEMMs         | K = N                                    |
| `masked`  | the dense GEMMs, unchosen neurons set to zero    | middling batches; GPU; the oracle        |
| `single`  | the chosen experts of one token after another    | CPU, one token                           |
| `skip`    | `masked`, without the experts that no token chose | CPU, few tokens                         |
| `loop`    | one small FFN per expert over its own tokens     | CPU, many tokens; training on a CPU      |
| `grouped` | the same in two grouped GEMMs                    | GPU, large layers; training on a GPU     |
| `slot`    | the weights of each (token, expert) pair, gathered | GPU, few of many experts               |

`kernel` is `factorctl.ffn.kernel.cpu`; where no compiler made it, and under autograd, the others serve.
`single`, `skip` and `loop` read the routing on the host and therefore stay on CPUs; the rest never synchronise and
compile to a full graph. Weights are read through views of one expert-contiguous copy. transformers' experts functions
`batched_mm` and `grouped_mm` hold the ideas of `slot` and `grouped`, but know no shared prefix and count on module
attributes that change between releases; exported checkpoints run on them.

T tokens, D hidden_size, F intermediate_size, N num_experts, H expert_size, S shared_size, K top_k,
G = 2H rows of a gate|up pair, R = N*H routed neurons, A = K*H active ones of a token, P = T*K (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Literal, NamedTuple

import torch
from torch.nn import functional as F

from factorctl.ffn.few_token_linear import linear
from factorctl.ffn.routing import Routing, TokenRouting, group_by_expert, scatter_weights

Activation = Callable[[torch.Tensor], torch.Tensor]
PathName = Literal["kernel", "dense", "masked", "single", "skip", "loop", "grouped", "slot"]

Step = tuple[int | None, PathName]
"""Up to how many tokens, None for however many, and the path that serves them. A plain pair: torch.compile in torch
2.11 makes no constant of a named tuple."""
Steps = tuple[Step, ...]
"""A ladder: the last step has no limit."""

Range = tuple[int, int]
"""Experts from the first number up to, not including, the second."""

CALL_COST_BYTES = {8: 1 << 20, 4: 1 << 20, 2: 768 << 10}
"""What one more expert in `single` or `skip` costs besides its weights, as bytes read in that time, by bytes per
weight. Measured on two cores of a Zen 5 server: 50 us. In bf16 oneDNN looks up a primitive per shape."""


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

    def between(self, start: int, stop: int) -> ExpertWeights:
        """Experts `start` up to `stop`: neighbours in storage, so again one dense FFN."""
        bias, size = self.gate_up_bias_NG, self.expert_size
        return ExpertWeights(
            self.gate_up_NGD[start:stop],
            self.down_DR[:, start * size : stop * size],
            None if bias is None else bias[start:stop],
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


def gate_up_products(x_TD: torch.Tensor, experts: ExpertWeights) -> torch.Tensor:
    """W_gate x and W_up x of every given expert, [T, N*2H]: one GEMM."""
    bias = experts.gate_up_bias_NG
    return linear(x_TD, experts.gate_up_NGD.flatten(0, 1), None if bias is None else bias.flatten())


def hidden_of_all(x_TD: torch.Tensor, experts: ExpertWeights) -> torch.Tensor:
    """act(gate x) * (up x) of every routed neuron, [T, N, H]: one GEMM over all experts."""
    products_TR = gate_up_products(x_TD, experts)
    return gated(products_TR.view(-1, experts.num_experts, 2 * experts.expert_size), experts.activation)


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


def single(
    x_TD: torch.Tensor, experts: ExpertWeights, routing: Routing, shared: SharedHidden | None = None
) -> torch.Tensor:
    """Token by token, the two products of each of its experts: see `one_token`, which this is for one token."""
    if not len(x_TD):
        return torch.zeros_like(x_TD) if shared is None else shared.output_TD()
    rows = []
    for token, (ids_K, weights_K) in enumerate(zip(routing.ids_TK.tolist(), routing.weights_TK, strict=True)):
        own = None if shared is None else SharedHidden(shared.hidden_TS[token : token + 1], shared.down_DF)
        rows.append(one_token(x_TD[token : token + 1], experts, TokenRouting(ids_K, weights_K.unbind()), own))
    return torch.cat(rows)


def one_token(
    x_1D: torch.Tensor, experts: ExpertWeights, routing: TokenRouting, shared: SharedHidden | None = None
) -> torch.Tensor:
    """The experts of one token, [1, D], in the fewest calls: on a CPU they cost a third of a small layer."""
    outputs = [] if shared is None else [shared.output_TD()]
    chosen = sorted(zip(routing.ids, routing.weights, strict=True), key=itemgetter(0))
    outputs += [_one_expert(x_1D, experts, *own) for own in chosen]
    y_1D = torch.zeros_like(x_1D) if not outputs else outputs[0]
    for own_1D in outputs[1:]:
        y_1D = y_1D + own_1D
    return y_1D


def _one_expert(x_1D: torch.Tensor, experts: ExpertWeights, expert: int, weight: float | torch.Tensor) -> torch.Tensor:
    bias = None if experts.gate_up_bias_NG is None else experts.gate_up_bias_NG[expert]
    hidden_1H = gated(linear(x_1D, experts.gate_up_NGD[expert], bias), experts.activation)
    if not (isinstance(weight, float) and weight == 1.0):
        hidden_1H = hidden_1H * weight
    size = experts.expert_size
    return linear(hidden_1H, experts.down_DR[:, expert * size : (expert + 1) * size])


def skip(
    x_TD: torch.Tensor, experts: ExpertWeights, routing: Routing, shared: SharedHidden | None = None
) -> torch.Tensor:
    """`masked` over the experts that some token chose, neighbours in one GEMM.

    With few tokens a CPU waits for weights, not for arithmetic: each weight is read at most once, no token is moved.
    What lies between the GEMMs runs once for all of them, because next to a small layer every call shows.
    """
    size = experts.expert_size
    ranges = list(runs(sorted(set(routing.ids_TK.flatten().tolist())), bridged_gap(experts)))
    chosen = [experts.between(start, stop) for start, stop in ranges]
    y_TD = None if shared is None else shared.output_TD()
    if not chosen:
        return torch.zeros_like(x_TD) if y_TD is None else y_TD
    products = [gate_up_products(x_TD, some) for some in chosen]
    products_TR = products[0] if len(products) == 1 else torch.cat(products, dim=1)
    hidden_TNH = gated(products_TR.view(x_TD.shape[0], -1, 2 * size), experts.activation)
    hidden_TNH = weigh(hidden_TNH, routing, ranges, experts.num_experts)
    for hidden_TR, some in zip(_split_ranges(hidden_TNH, ranges), chosen, strict=True):
        own_TD = linear(hidden_TR, some.down_DR)
        y_TD = own_TD if y_TD is None else y_TD + own_TD
    assert y_TD is not None
    return y_TD


def weigh(hidden_TNH: torch.Tensor, routing: Routing, ranges: list[Range], num_experts: int) -> torch.Tensor:
    """Multiply the experts in `ranges` by their weights; those that a token did not choose become zero."""
    weights_TN = scatter_weights(routing, num_experts).to(hidden_TNH.dtype)
    slices = [weights_TN[:, start:stop] for start, stop in ranges]
    return hidden_TNH * (slices[0] if len(slices) == 1 else torch.cat(slices, dim=1)).unsqueeze(-1)


def _split_ranges(hidden_TNH: torch.Tensor, ranges: list[Range]) -> tuple[torch.Tensor, ...]:
    """[T, neurons of the range], range by range."""
    hidden_TR, size = hidden_TNH.flatten(1), hidden_TNH.shape[2]
    if len(ranges) == 1:
        return (hidden_TR,)
    return torch.split(hidden_TR, [(stop - start) * size for start, stop in ranges], dim=1)


def bridged_gap(experts: ExpertWeights) -> int:
    """How many unchosen experts between two chosen ones are cheaper to run, with weight zero, than to step over."""
    weight = experts.gate_up_NGD
    expert_bytes = 3 * experts.expert_size * weight.shape[2] * weight.dtype.itemsize
    return CALL_COST_BYTES[weight.dtype.itemsize] // expert_bytes


def runs(ids: list[int], gap: int) -> Iterator[Range]:
    """[start, stop) ranges over a sorted list of ids; up to `gap` ids may be missing within a range."""
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or ids[i] - ids[i - 1] - 1 > gap:
            yield ids[start], ids[i - 1] + 1
            start = i


def loop(
    x_TD: torch.Tensor, experts: ExpertWeights, routing: Routing, shared: SharedHidden | None = None
) -> torch.Tensor:
    """One small FFN after another over the tokens that chose it. Reads the routing on the host: for CPUs.

    What lies between the GEMMs runs once for all experts. Weights are taken apart once (`unbind`, `split`), so that
    the backward pass puts gradients together once; indexing expert by expert would build N gradients of the full size.
    """
    if not routing.ids_TK.numel():
        return torch.zeros_like(x_TD) if shared is None else shared.output_TD()
    groups = group_by_expert(routing.ids_TK)
    counts = torch.bincount(groups.expert_P, minlength=experts.num_experts).tolist()
    busy = [expert for expert, count in enumerate(counts) if count]
    sizes = [counts[expert] for expert in busy]
    gate_up, downs = experts.gate_up_NGD.unbind(), torch.split(experts.down_DR, experts.expert_size, dim=1)
    biases = [None] * len(counts) if experts.gate_up_bias_NG is None else experts.gate_up_bias_NG.unbind()
    pieces = zip(torch.split(x_TD.index_select(0, groups.token_P), sizes), busy, strict=True)
    gate_up_PG = torch.cat([linear(x_ED, gate_up[expert], biases[expert]) for x_ED, expert in pieces])
    hidden_PH = weighted(gate_up_PG, experts.activation, routing.weights_TK, groups.order_P)
    hidden = torch.split(hidden_PH, sizes)
    y_PD = torch.cat([linear(hidden_EH, downs[expert]) for hidden_EH, expert in zip(hidden, busy, strict=True)])
    return _in_token_order(y_PD, groups.order_P, routing, shared)


def grouped(
    x_TD: torch.Tensor, experts: ExpertWeights, routing: Routing, shared: SharedHidden | None = None
) -> torch.Tensor:
    """`loop` in two grouped GEMMs, without host synchronisation: for bf16 on a GPU, see `can_group`."""
    groups = group_by_expert(routing.ids_TK)
    boundaries = torch.arange(experts.num_experts, device=x_TD.device)
    ends_N = torch.searchsorted(groups.expert_P, boundaries, right=True, out_int32=True)
    x_PD = x_TD.index_select(0, groups.token_P).to(experts.gate_up_NGD.dtype)
    gate_up_PG = F.grouped_mm(x_PD, experts.gate_up_NGD.transpose(1, 2), offs=ends_N)
    if experts.gate_up_bias_NG is not None:
        gate_up_PG = gate_up_PG + experts.gate_up_bias_NG[groups.expert_P]
    hidden_PH = weighted(gate_up_PG, experts.activation, routing.weights_TK, groups.order_P)
    y_PD = F.grouped_mm(hidden_PH, experts.down_NDH.transpose(1, 2), offs=ends_N)
    return _in_token_order(y_PD, groups.order_P, routing, shared)


def weighted(
    gate_up_PG: torch.Tensor, activation: Activation, weights_TK: torch.Tensor, order_P: torch.Tensor
) -> torch.Tensor:
    """act(gate) * up of pairs sorted by expert, each times its weight, [P, H]."""
    weights_P = weights_TK.flatten().index_select(0, order_P)
    return gated(gate_up_PG, activation) * weights_P.unsqueeze(1).to(gate_up_PG.dtype)


def can_group(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether `F.grouped_mm` takes matrices whose rows and offsets have these sizes: 16-byte alignment."""
    return all(size * dtype.itemsize % 16 == 0 for size in sizes)


def slot(
    x_TD: torch.Tensor, experts: ExpertWeights, routing: Routing, shared: SharedHidden | None = None
) -> torch.Tensor:
    """A matrix-vector product per (token, expert) pair with gathered weights: for T*K far below N on a GPU.

    Eager, the gather copies the experts' weights. Inductor fuses it into the products only with
    `coordinate_descent_tuning`, which `max-autotune` sets and `reduce-overhead` does not.
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
    "single": single,
    "skip": skip,
    "loop": loop,
    "grouped": grouped,
    "slot": slot,
}
