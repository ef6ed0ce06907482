"""The paths on a CUDA device: right, free of host synchronisation, captured once and replayed with other experts."""

from __future__ import annotations

import pytest
import torch

from factorctl.config.shape import FactorShape
from factorctl.ffn.layer import FactoredFFN
from factorctl.ffn.routing import Routing

pytestmark = pytest.mark.gpu
CUDA_PATHS = ("slot", "masked", "grouped")


@pytest.fixture(autouse=True)
def _cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def make_ffn(n: int = 4, k: int = 2, h: int = 128, s: int = 64, d: int = 256, dtype=torch.bfloat16) -> FactoredFFN:
    torch.manual_seed(0)
    ffn = FactoredFFN(FactorShape(n, k, h, s), d, "silu", dtype=dtype, device="cuda")
    with torch.no_grad():
        for parameter in ffn.parameters():
            parameter.normal_(std=0.05)
        ffn.router.normal_()
    return ffn


def inputs(tokens: int, d: int = 256, dtype=torch.bfloat16, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(tokens, d, generator=generator, device="cuda", dtype=dtype)


def exact(ffn: FactoredFFN, x_TD: torch.Tensor) -> FactoredFFN:
    """float64 on the CPU through `masked`, which the CPU tests hold against a plain loop; same routing for `x_TD`."""
    copy = FactoredFFN(ffn.shape, ffn.hidden_size, "silu", gate=ffn.gate, scale_a=ffn.scale_a, dtype=torch.float64)
    copy.load_state_dict(ffn.state_dict())
    copy.path = "masked"
    ids_TK, weights_TK = (tensor.detach().cpu() for tensor in ffn.route(x_TD))
    copy.route = lambda _: Routing(ids_TK, weights_TK.double())  # type: ignore[method-assign]
    return copy


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.detach().double().cpu() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.parametrize("path", CUDA_PATHS)
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 63, 64, 65, 513])
@pytest.mark.parametrize(("n", "k", "h"), [(4, 1, 128), (4, 2, 128), (64, 8, 24)])
def test_forward_against_float64(path: str, tokens: int, n: int, k: int, h: int) -> None:
    ffn = make_ffn(n, k, h)
    ffn.path = path
    x_TD = inputs(tokens)
    assert error(ffn(x_TD), exact(ffn, x_TD)(x_TD.double().cpu())) < 1e-2


@pytest.mark.parametrize("path", CUDA_PATHS)
def test_gradients_with_empty_experts_after_dirtying_the_allocator(path: str) -> None:
    """grouped_mm's backward has left gradients of empty groups unwritten on some devices (pytorch #172439)."""
    ffn = make_ffn(n=8, k=1)
    ffn.path = path
    x_TD = inputs(64)
    with torch.no_grad():
        ffn.router[2:] = 0
        ffn.router[:2, 0], x_TD[:, 0] = 10.0, 10.0  # the first two experts take all tokens
    poison = torch.full((64 << 20,), float("nan"), device="cuda")
    del poison
    ffn(x_TD).float().sum().backward()
    reference = exact(ffn, x_TD)
    reference(x_TD.double().cpu()).sum().backward()
    assert set(ffn.route(x_TD).ids_TK.unique().tolist()) <= {0, 1}
    for name in ("gate_up", "down", "shared_gate_up"):
        gradient = getattr(ffn, name).grad
        assert gradient.isfinite().all(), name
        assert error(gradient, getattr(reference, name).grad) < 3e-2, name


@pytest.mark.parametrize("path", CUDA_PATHS)
def test_no_path_synchronises_with_the_host(path: str) -> None:
    ffn = make_ffn()
    ffn.path = path
    x_TD = inputs(32)
    ffn(x_TD)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ffn(x_TD).float().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens", [1, 8, 1024])
def test_auto_never_picks_a_path_of_the_cpu(tokens: int) -> None:
    assert make_ffn().path_for(tokens) in CUDA_PATHS
    assert make_ffn(h=25, s=0, d=250).path_for(tokens) in ("slot", "masked")


@pytest.mark.parametrize("path", CUDA_PATHS)
def test_a_captured_graph_replays_with_other_experts(path: str) -> None:
    ffn = make_ffn(s=0).requires_grad_(False)
    ffn.path = path
    static = inputs(4)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            ffn(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ffn(static)
    for seed in (2, 3, 4):
        static.copy_(inputs(4, seed=seed))
        graph.replay()
        torch.testing.assert_close(captured, ffn(static), atol=1e-2, rtol=1e-2)


def test_compiled_slot_does_not_copy_the_chosen_experts() -> None:
    ffn = make_ffn(n=8, k=1, h=1024, s=0, d=1024).requires_grad_(False)
    ffn.path = "slot"
    options = {"triton.cudagraphs": False, "coordinate_descent_tuning": True}
    compiled = torch.compile(ffn, fullgraph=True, dynamic=False, options=options)
    x_TD = inputs(1, d=1024)
    compiled(x_TD)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    compiled(x_TD)
    expert_bytes = 3 * 1024 * 1024 * 2
    assert torch.cuda.max_memory_allocated() - before < expert_bytes / 4
