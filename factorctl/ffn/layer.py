"""The factored FFN: what stands in for a decoder layer's dense FFN.

    r = W_router x;  C = the K experts with the largest r
    y = FFN_shared(x) + s * sum_{e in C} p_e(x) * FFN_e(x) + b_down,   s = a*K

At K = N there is nothing to route: every expert runs with unit weight, which is the dense FFN exactly.
At K = 0 only the shared neurons run: static pruning, the control that routing must beat.

T tokens, D hidden_size, F intermediate_size, N num_experts, H expert_size, S shared_size, G = 2H.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.nn import functional as F
from transformers.activations import ACT2FN

from factorctl.config.shape import FactorShape, Gate
from factorctl.errors import UsageError
from factorctl.ffn import tuned as tuned_paths
from factorctl.ffn.choice import kernel_tokens, path_at, steps_for
from factorctl.ffn.few_token_linear import linear
from factorctl.ffn.kernel import cpu as cpu_kernel
from factorctl.ffn.kernel.cpu import FFNWeights, KernelFFN, unseen_calls_matter
from factorctl.ffn.paths import (
    GROUPED_DTYPES,
    ROUTED_PATHS,
    ExpertWeights,
    PathName,
    SharedHidden,
    Steps,
    gated,
    hidden_of_all,
    serves_grouped,
)
from factorctl.ffn.routing import Routing, gate_weights, route, unit_routing

Chooser = Callable[[torch.Tensor], torch.Tensor]
"""FFN input [T, D] -> ids of the experts of each token, [T, K]."""


class Plan(NamedTuple):
    """How a layer runs: the ladder of its paths, and itself as the CPU kernel takes it, where that serves."""

    kernel: KernelFFN | None
    steps: Steps


class FactoredFFN(nn.Module):
    """A gated FFN whose neurons lie expert after expert, shared neurons first.

    Parameters and their shapes, which are also the tensors on disk:
        gate_up [N, 2H, D]: per expert the gate rows, then the up rows.
        shared_gate_up [2S, D]: the same for the shared neurons; absent when S = 0.
        down [D, F]: the dense layout with permuted columns, so that one copy serves every path.
        router [N, D].
        gate_up_bias [N, 2H], shared_gate_up_bias [2S], down_bias [D]: only where the source has FFN biases.
        neuron_ids [F], int32: the source's id of every stored neuron, so that the dense layout can be restored.

    Args:
        scale_a: the layer's `a`; `sum` is 1, `paper` is N/K, `fitted` comes from calibration.
    """

    def __init__(
        self,
        shape: FactorShape,
        hidden_size: int,
        activation: str,
        *,
        gate: Gate = "softmax",
        scale_a: float = 1.0,
        gate_up_bias: bool = False,
        down_bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.hidden_size = shape, hidden_size
        self.gate, self.scale_a = gate, scale_a
        self.activation_name, self.activation = activation, ACT2FN[activation]
        self.path: PathName | Literal["auto"] = "auto"
        self.chooser: Chooser | None = None
        """Chooses the experts instead of the router's largest logits: for controls. The gate stays the router's."""
        self._known_plan: tuple[tuple[object, ...], Plan] = (), Plan(None, ())

        def parameter(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*size, dtype=dtype, device=device))

        n, h, s = shape.num_experts, shape.expert_size, shape.shared_size
        self.gate_up = parameter(n, 2 * h, hidden_size)
        self.shared_gate_up = parameter(2 * s, hidden_size) if s else None
        self.down = parameter(hidden_size, shape.intermediate_size)
        self.router = parameter(n, hidden_size)
        self.gate_up_bias = parameter(n, 2 * h) if gate_up_bias else None
        self.shared_gate_up_bias = parameter(2 * s) if gate_up_bias and s else None
        self.down_bias = parameter(hidden_size) if down_bias else None
        self.neuron_ids: torch.Tensor
        self.register_buffer("neuron_ids", torch.arange(shape.intermediate_size, dtype=torch.int32, device=device))

    def extra_repr(self) -> str:
        return f"{self.shape.notation}, hidden_size={self.hidden_size}, gate={self.gate}, scale_a={self.scale_a:g}"

    @property
    def top_k(self) -> int:
        """K of its shape. Setting it exchanges the shape; the weights serve every K."""
        return self.shape.top_k

    @top_k.setter
    def top_k(self, top_k: int) -> None:
        self.shape = replace(self.shape, top_k=top_k)

    @property
    def routes(self) -> bool:
        """Whether there is a choice between experts: 0 < K < N."""
        return self.shape.routes

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The fields of its shape."""
        return self.shape.num_experts, self.shape.top_k, self.shape.expert_size, self.shape.shared_size

    @property
    def experts(self) -> ExpertWeights:
        """The routed experts as views; nothing is copied."""
        down = self.down[:, self.shape.shared_size :] if self.shape.shared_size else self.down
        return ExpertWeights(self.gate_up, down, self.gate_up_bias, self.activation)

    def keep_experts_together(self) -> None:
        """Store `down` column after column, so that each expert's part of it is one block of memory.

        Shape and values stay. The kernel then streams what is on from end to end, which static pruning gains by as
        routing does; what serves in its stead is faster with rows, and so is the dense layer.
        """
        some_are_off = self.top_k < self.shape.num_experts
        if some_are_off and self.down.is_cpu and self.down.dtype in cpu_kernel.DTYPES and cpu_kernel.is_available():
            self.down.data = self.down.data.t().contiguous().t()

    def router_logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        """W_router x, [T, N], in the router's own dtype."""
        return F.linear(x_TD.to(self.router.dtype), self.router)

    def route(self, x_TD: torch.Tensor) -> Routing:
        logits_TN = self.router_logits(x_TD)
        if self.chooser is None:
            return route(logits_TN, top_k=self.top_k, gate=self.gate, scale_a=self.scale_a)
        ids_TK = self.chooser(x_TD)
        return Routing(ids_TK, gate_weights(logits_TN.gather(1, ids_TK), gate=self.gate, scale_a=self.scale_a))

    def shared_hidden(self, x_TD: torch.Tensor) -> torch.Tensor:
        """act(gate x) * (up x) of the shared neurons, [T, S]."""
        if self.shared_gate_up is None:
            return x_TD[:, :0]
        return gated(linear(x_TD, self.shared_gate_up, self.shared_gate_up_bias), self.activation)

    def always_on(self, shared_TS: torch.Tensor) -> torch.Tensor:
        """What every token gets, whoever is chosen: the shared neurons' output plus the down bias, [T, D].

        Args:
            shared_TS: as `shared_hidden` gives it.
        """
        return F.linear(shared_TS, self.down[:, : self.shape.shared_size], self.down_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        plan = self._plan()
        if plan.kernel is not None and not plan.kernel.takes(hidden_states):
            plan = self._make_plan(None)
        path = self._path_in(plan, hidden_states.numel() // self.hidden_size)
        if path == "kernel" and plan.kernel is not None:
            y = self._by_kernel(hidden_states, plan.kernel)
        else:
            y = self._output(hidden_states.reshape(-1, self.hidden_size), path).view(hidden_states.shape)
        return y if self.down_bias is None else y + self.down_bias

    def path_for(self, tokens: int) -> PathName:
        """The path that `tokens` tokens take: `path`, or what sizes, dtype, device and autograd suggest.

        Raises:
            UsageError: when `path` was set to one that this layer cannot take.
        """
        return self._path_in(self._plan(), tokens)

    def kernel(self) -> KernelFFN | None:
        """This layer as the CPU kernel takes it; None where that cannot serve."""
        return self._plan().kernel

    def _path_in(self, plan: Plan, tokens: int) -> PathName:
        return path_at(plan.steps, tokens) if self.path == "auto" else self._checked_path(self.path, plan.kernel)

    def _plan(self) -> Plan:
        """How to run in the present state: looked up once, then recognised in the fewest steps.

        What Python does here costs a token three times as much as elsewhere: the weights have emptied the caches.
        """
        if is_compiling():
            return self._make_plan(None)
        own = self._parameters
        gate_up, down, router, shared = own["gate_up"], own["down"], own["router"], own.get("shared_gate_up")
        if gate_up is None or router is None or type(down) is not nn.Parameter:
            return self._make_plan(None)
        state = (
            gate_up.data_ptr(), down.data_ptr(), router.data_ptr(), 0 if shared is None else shared.data_ptr(),
            self.shape, self.gate, self.scale_a, torch.get_num_threads(), tuned_paths.generation(),
            self._learns(), unseen_calls_matter(),
        )  # fmt: skip
        if state != self._known_plan[0]:
            weights = FFNWeights(gate_up, shared, down, router)
            self._known_plan = state, self._make_plan(None if any(state[-2:]) else self._for_kernel(weights))
        return self._known_plan[1]

    def _learns(self) -> bool:
        """Whether a backward pass will ask for gradients of this layer."""
        own = self._parameters.values()
        return torch.is_grad_enabled() and any(weight.requires_grad for weight in own if weight is not None)

    def _make_plan(self, kernel: KernelFFN | None) -> Plan:
        weight = self.gate_up
        if self.routes:
            learns, sizes = self._learns(), self.sizes
            steps: Steps = steps_for(weight.device, weight.dtype, self.hidden_size, sizes, kernel is not None, learns)
            return Plan(kernel, steps)
        first = () if kernel is None else ((kernel_tokens(weight.dtype), "kernel"),)
        return Plan(kernel, (*first, (None, "dense" if self.top_k else "masked")))

    def _for_kernel(self, weights: FFNWeights) -> KernelFFN | None:
        known = self.activation_name in cpu_kernel.ACTIVATIONS and self.gate_up_bias is None
        if not known or not weights.fit_the_kernel() or not cpu_kernel.is_available():
            return None
        return KernelFFN(weights, self.shape, activation=self.activation_name, gate=self.gate, scale_a=self.scale_a)

    def _by_kernel(self, x: torch.Tensor, kernel: KernelFFN) -> torch.Tensor:
        if self.chooser is None or not self.routes:
            return kernel(x)
        return kernel(x, *self.route(x.reshape(-1, self.hidden_size)))

    def _checked_path(self, path: PathName, kernel: KernelFFN | None) -> PathName:
        if path == "kernel" and kernel is None:
            raise UsageError(f"path 'kernel' cannot run here: {self._why_no_kernel()}", "choose 'masked'")
        if path == "dense" and self.top_k != self.shape.num_experts:
            raise UsageError(
                f"path 'dense' runs all {self.shape.num_experts} experts, but top-k is {self.top_k}", "choose 'masked'"
            )
        if path == "grouped" and not self.serves_grouped:
            sizes = self.hidden_size, self.shape.expert_size, self.shape.shared_size
            dtypes = ", ".join(_named(dtype) for dtype in GROUPED_DTYPES)
            raise UsageError(
                f"path 'grouped' takes {dtypes} in rows of a multiple of 16 bytes; D, H, S are {sizes} of "
                f"{_named(self.gate_up.dtype)}",
                "choose 'masked'",
            )
        return path

    @property
    def serves_grouped(self) -> bool:
        """Whether the path `grouped` takes its dtype and sizes."""
        return serves_grouped(self.gate_up.dtype, self.hidden_size, self.shape.expert_size, self.shape.shared_size)

    def _why_no_kernel(self) -> str:
        if reason := cpu_kernel.reason_without():
            return reason
        return (
            "it takes float32 and bfloat16 on a CPU, FFNs without gate and up biases, activations "
            f"{', '.join(sorted(cpu_kernel.ACTIVATIONS))}, no gradient, and nobody who watches torch's dispatcher"
        )

    def _output(self, x_TD: torch.Tensor, path: PathName) -> torch.Tensor:
        """Everything but the down-projection's bias."""
        shared = SharedHidden(self.shared_hidden(x_TD), self.down) if self.shape.shared_size else None
        if path == "dense":
            return self._all_experts(x_TD, shared)
        if self.top_k == 0:
            assert shared is not None, "K = 0 needs shared neurons"
            return shared.output_TD()
        if self.top_k == self.shape.num_experts:
            routing = unit_routing(x_TD.shape[0], self.top_k, x_TD.device)
        else:
            routing = self.route(x_TD)
        return ROUTED_PATHS[path](x_TD, self.experts, routing, shared)

    def _all_experts(self, x_TD: torch.Tensor, shared: SharedHidden | None) -> torch.Tensor:
        """K = N: the dense FFN with permuted neurons, one GEMM into [T, F] and one out of it."""
        hidden = hidden_of_all(x_TD, self.experts).flatten(1)
        return linear(hidden if shared is None else torch.cat([shared.hidden_TS, hidden], dim=-1), self.down)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
