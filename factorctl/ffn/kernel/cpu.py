"""Our CPU kernel as Python functions over tensors: without gradient, float32 or bfloat16.

It sees memory, not tensors: nothing here may be traced, differentiated or counted by torch's dispatcher, and whoever
calls asks `can_run` first.

T tokens, D hidden_size, N num_experts, H expert_size, S shared_size, K top_k, I inputs, O outputs.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
from pathlib import Path
from typing import NamedTuple, TypeGuard

import torch
from torch import is_autocast_enabled
from torch._C import _len_torch_dispatch_stack

from factorctl.config.shape import FactorShape, Gate
from factorctl.ffn.kernel.compiling import NoKernelError, compiled_library
from factorctl.files.cache import cache_directory

SWITCH = "FACTORCTL_KERNEL"
ACTIVATIONS = {
    "silu": 0, "swish": 0, "gelu_pytorch_tanh": 1, "gelu_new": 1, "gelu_fast": 1, "quick_gelu": 2, "relu": 3,
}  # fmt: skip
_PLAIN = (torch.nn.Parameter, torch.Tensor)
DTYPES = (torch.float32, torch.bfloat16)
NO_SUCH_EXPERT = 2
SELF_CHECK_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class _Layer(ctypes.Structure):
    """`Layer` of layer.h. Addresses are plain integers, so that a module that holds one can be copied."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("gate_up", "shared_gate_up", "down", "router")),
        *((name, ctypes.c_int64) for name in ("hidden_size", "num_experts", "expert_size", "shared_size", "top_k")),
        ("down_row_stride", ctypes.c_int64),
        ("down_column_stride", ctypes.c_int64),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("bfloat16", "hard_gate", "activation")),
    )


class FFNWeights(NamedTuple):
    """What one FFN is made of; None where N or S is 0.

    gate_up [N, 2H, D], shared_gate_up [2S, D], down [D, S + N*H] row after row or column after column, router [N, D].
    """

    gate_up: torch.Tensor | None
    shared_gate_up: torch.Tensor | None
    down: torch.Tensor
    router: torch.Tensor | None

    def fit_the_kernel(self) -> bool:
        """Whether it can read them as they lie in memory."""
        rows = [weight for weight in (self.gate_up, self.shared_gate_up, self.router) if weight is not None]
        return (
            self.down.dtype in DTYPES
            and all(is_plain(weight) and weight.dtype == self.down.dtype for weight in (*rows, self.down))
            and all(weight.is_contiguous() for weight in rows)
            and 1 in self.down.stride()
        )


class KernelFFN:
    """One FFN that the kernel computes: addresses and sizes, set once."""

    def __init__(
        self, weights: FFNWeights, shape: FactorShape, *, activation: str, gate: Gate = "softmax", scale_a: float = 1.0
    ) -> None:
        """
        Args:
            shape: its `top_k` is how many experts each token gets; all of them, N, count with weight one.
        """

        def address(weight: torch.Tensor | None) -> int:
            return 0 if weight is None else weight.data_ptr()

        down = weights.down
        self._dtype, self._hidden_size = down.dtype, down.shape[0]
        self._layer = _Layer(
            address(weights.gate_up), address(weights.shared_gate_up), address(down), address(weights.router),
            down.shape[0], shape.num_experts, shape.expert_size, shape.shared_size, shape.top_k,
            *down.stride(), scale_a * shape.top_k, down.dtype == torch.bfloat16, gate == "hard",
            ACTIVATIONS[activation],
        )  # fmt: skip

    def takes(self, x: torch.Tensor) -> bool:
        """Whether `x` is a plain [..., D] in the weights' dtype, and no gradient must reach it."""
        return (
            type(x) in _PLAIN
            and x.dtype is self._dtype
            and x.is_cpu
            and x.size(-1) == self._hidden_size
            and not (x.requires_grad and torch.is_grad_enabled())
        )

    def __call__(
        self, x: torch.Tensor, ids_TK: torch.Tensor | None = None, weights_TK: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Its output for x of [..., D], T tokens in all, without the down-projection's bias.

        Args:
            ids_TK, weights_TK: the experts and their weights, where they are not the router's to choose.

        Raises:
            IndexError: there is no such expert.
            MemoryError: for the activations of T tokens.
        """
        if ids_TK is not None and weights_TK is not None:
            ids_TK, weights_TK = ids_TK.to(torch.int64).contiguous(), weights_TK.to(torch.float32).contiguous()
        if not x.is_contiguous():
            x = x.contiguous()
        y = torch.empty_like(x)
        tokens = x.numel() // self._hidden_size
        ids = 0 if ids_TK is None else ids_TK.data_ptr()
        weights = 0 if weights_TK is None else weights_TK.data_ptr()
        fault = _library().factorctl_ffn(
            ctypes.byref(self._layer), x.data_ptr(), tokens, ids, weights, y.data_ptr(), torch.get_num_threads()
        )  # fmt: skip
        if fault == NO_SUCH_EXPERT:
            raise IndexError(f"an expert was chosen that is none of the {self._layer.num_experts}")
        if fault:
            raise MemoryError(f"no memory for the FFN activations of {tokens} tokens")
        return y


def linear(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear(x, weight_OI, bias_O)` for x of [..., I], where `can_run` and the weight's rows are contiguous."""
    x = x.contiguous()
    outputs, inputs = weight_OI.shape
    y = x.new_empty(*x.shape[:-1], outputs)
    failed = _library().factorctl_linear(
        x.data_ptr(), weight_OI.data_ptr(), weight_OI.stride(0), 0 if bias_O is None else bias_O.data_ptr(),
        y.data_ptr(), x.numel() // inputs, inputs, outputs, x.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory for the inputs of {x.numel() // inputs} tokens")
    return y


def can_run(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel may multiply these two: it is there, knows their dtype, and nobody watches.

    A dispatch mode (FakeTensor, FlopCounterMode), a compiler or autocast would not see the call; autograd could not
    follow it.
    """
    return (
        not torch.compiler.is_compiling()
        and x.dtype == weight.dtype
        and weight.dtype in DTYPES
        and is_plain(x)
        and is_plain(weight)
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not unseen_calls_matter()
        and is_available()
    )


def unseen_calls_matter() -> bool:
    """Whether a dispatch mode or autocast is on."""
    return _len_torch_dispatch_stack() > 0 or is_autocast_enabled("cpu")


def is_available() -> bool:
    """Whether this machine has the kernel; compiles it at the first question."""
    return reason_without() is None


@functools.cache
def reason_without() -> str | None:
    """Why factorctl computes with torch alone here; None where the kernel runs."""
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "no"):
        return f"{SWITCH} switches it off"
    try:
        _library()
        _check()
    except NoKernelError as error:
        return str(error)
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    """The library, loaded.

    Raises:
        NoKernelError: there is none.
    """
    return _on_trial[0] if _on_trial else _loaded(compiled_library(cache_directory() / "kernels"))


_on_trial: list[ctypes.CDLL] = []
"""The library of `try_out`, in its own process; everywhere else empty."""


def _loaded(path: str | Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NoKernelError(f"it cannot be loaded: {error}") from error
    address, size, whole = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.factorctl_ffn.argtypes = (address, address, size, address, address, address, whole)
    library.factorctl_linear.argtypes = (address, address, size, address, address, size, size, size, whole, whole)
    return library


def try_out(path: str) -> None:
    """Compute with a library of which nothing is known, in a process that may be lost."""
    _on_trial.append(_loaded(path))
    _check()


def is_plain(weight: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    """A tensor in this process's memory: no DTensor or quantised subclass, whose address says little."""
    return weight is not None and type(weight) in _PLAIN and weight.is_cpu


def _check() -> None:
    """Small products against torch's, so that a compiler's mistake costs speed and not results.

    Raises:
        NoKernelError: they differ.
    """
    generator = torch.Generator().manual_seed(0)
    experts, size, width = 2, 24, 77
    for dtype, tolerance in SELF_CHECK_TOLERANCE.items():

        def draw(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        x, gate_up, down = draw(40, width), draw(experts, 2 * size, width), draw(width, experts * size)
        found = [(linear(x, gate_up[0]), x.double() @ gate_up[0].double().t())]
        for tokens, layout in itertools.product((1, 9, 40), (down, down.t().contiguous().t())):
            ids_T = torch.arange(tokens) % experts
            kernel = KernelFFN(
                FFNWeights(gate_up, None, layout, None), FactorShape(experts, 1, size, 0), activation="relu"
            )
            gate, up = torch.einsum("tgd,td->tg", gate_up[ids_T].double(), x[:tokens].double()).chunk(2, dim=1)
            down_TDH = down.double().unflatten(1, (experts, size)).transpose(0, 1)[ids_T]
            y = kernel(x[:tokens], ids_T[:, None], torch.ones(tokens, 1))
            found.append((y, torch.einsum("tdh,th->td", down_TDH, gate.relu() * up)))
        if any(not (y.double() - exact).norm() <= tolerance * exact.norm() for y, exact in found):
            raise NoKernelError(f"it computes wrong {dtype} products when compiled here")
