"""Every execution path against a plain float64 loop over tokens: outputs and all gradients."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from factorctl.config.shape import FactorShape
from factorctl.errors import UsageError
from factorctl.ffn import choice as path_choice
from factorctl.ffn import tuned as tuned_paths
from factorctl.ffn.kernel import cpu as cpu_kernel
from factorctl.ffn.layer import FactoredFFN
from factorctl.ffn.paths import ROUTED_PATHS
from factorctl.ffn.routing import group_by_expert, unit_routing

PATHS = sorted(ROUTED_PATHS)
ALIGNED = [path for path in PATHS if path != "grouped"]  # `grouped` takes rows of a multiple of 16 bytes only
TOKENS = [0, 1, 2, 7, 8, 9, 63, 64, 65, 513]


def make_ffn(n=4, k=2, h=8, s=0, d=16, *, bias=False, dtype=torch.float32, seed=0, **kwargs) -> FactoredFFN:
    ffn = FactoredFFN(FactorShape(n, k, h, s), d, "silu", gate_up_bias=bias, down_bias=bias, dtype=dtype, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in ffn.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return ffn


def tokens_for(ffn: FactoredFFN, tokens: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, ffn.hidden_size, generator=generator).to(ffn.gate_up.dtype)


def gate_up_of(weight_GD: torch.Tensor, bias_G: torch.Tensor | None, x_D: torch.Tensor) -> torch.Tensor:
    gate_up = weight_GD @ x_D if bias_G is None else weight_GD @ x_D + bias_G
    half = gate_up.shape[0] // 2
    return nn.functional.silu(gate_up[:half]) * gate_up[half:]


def plain_loop(ffn: FactoredFFN, x_TD: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """The definition, token by token and expert by expert; `ids_TK` fixes the choice, so that rounding cannot."""
    shape, rows = ffn.shape, []
    for x_D, ids in zip(x_TD, ids_TK.tolist(), strict=True):
        y_D = torch.zeros_like(x_D) if ffn.down_bias is None else ffn.down_bias.clone()
        if shape.shared_size:
            hidden = gate_up_of(ffn.shared_gate_up, ffn.shared_gate_up_bias, x_D)
            y_D = y_D + ffn.down[:, : shape.shared_size] @ hidden
        logits = torch.stack([ffn.router[e] @ x_D for e in ids]) if ids else x_D[:0]
        weights = torch.softmax(logits, 0) * ffn.scale_a * len(ids)
        if ffn.gate == "hard":
            weights = torch.full_like(logits, ffn.scale_a)
        if len(ids) == shape.num_experts:
            weights = torch.ones_like(logits)
        for weight, e in zip(weights, ids, strict=True):
            start = shape.shared_size + e * shape.expert_size
            bias = None if ffn.gate_up_bias is None else ffn.gate_up_bias[e]
            hidden = gate_up_of(ffn.gate_up[e], bias, x_D)
            y_D = y_D + weight * (ffn.down[:, start : start + shape.expert_size] @ hidden)
        rows.append(y_D)
    return torch.stack(rows) if rows else x_TD.clone()


def choice(ffn: FactoredFFN, x_TD: torch.Tensor) -> torch.Tensor:
    if ffn.top_k == ffn.shape.num_experts:
        return unit_routing(len(x_TD), ffn.top_k, x_TD.device).ids_TK
    return ffn.route(x_TD).ids_TK if ffn.top_k else torch.empty(len(x_TD), 0, dtype=torch.long)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the norm of what is expected, in float64."""
    actual, expected = actual.detach(), expected.detach()
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def forward_and_gradients(run, ffn: FactoredFFN, x_TD: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output and the gradient of every parameter and of x, under a fixed random output gradient."""
    x_TD = x_TD.clone().requires_grad_()
    ffn.zero_grad()
    y_TD = run(x_TD)
    direction = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(7)).to(y_TD.dtype)
    (y_TD * direction).sum().backward()
    found = {name: p.grad for name, p in ffn.named_parameters() if p.grad is not None}
    return {"y": y_TD.detach(), "x": x_TD.grad} | {name: gradient.clone() for name, gradient in found.items()}


def check(ffn: FactoredFFN, path: str, x_TD: torch.Tensor, tolerance: float = 1e-5) -> None:
    ffn.path = path
    # Freed NaNs are what a path that reads memory it never wrote would find.
    del_me = torch.full((max(1, len(x_TD)) * ffn.top_k, 4 * ffn.shape.intermediate_size), float("nan"))
    ids_TK = choice(ffn, x_TD)
    del del_me
    actual = forward_and_gradients(ffn, ffn, x_TD)
    exact = make_exact(ffn)
    expected = forward_and_gradients(lambda x: plain_loop(exact, x, ids_TK), exact, x_TD.double())
    for name, value in expected.items():
        got = actual.get(name)
        if got is None:
            assert value.norm() == 0, f"{path}: no gradient for {name}"
            continue
        assert got.isfinite().all(), f"{path}: {name} is not finite"
        # A gradient may be zero on paper (the router's at K = 1) and rounding in float64: absolute below 1e-9.
        assert error(got, value) < tolerance or (got.double() - value).abs().max() < 1e-9, f"{path}: {name}"


def make_exact(ffn: FactoredFFN) -> FactoredFFN:
    exact = FactoredFFN(
        ffn.shape,
        ffn.hidden_size,
        "silu",
        gate=ffn.gate,
        scale_a=ffn.scale_a,
        gate_up_bias=ffn.gate_up_bias is not None,
        down_bias=ffn.down_bias is not None,
        dtype=torch.float64,
    )
    exact.load_state_dict(ffn.state_dict())
    return exact


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_token_counts(path: str, tokens: int) -> None:
    ffn = make_ffn(n=4, k=2, h=8, s=8)
    check(ffn, path, tokens_for(ffn, tokens))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("gate", ["softmax", "hard"])
@pytest.mark.parametrize(("n", "k"), [(4, 1), (4, 3), (4, 4), (64, 1), (64, 8)])
def test_experts_and_gates(path: str, gate: str, n: int, k: int) -> None:
    ffn = make_ffn(n=n, k=k, h=4, d=8, gate=gate, scale_a=n / k)
    check(ffn, path, tokens_for(ffn, 17))


@pytest.mark.parametrize("path", ALIGNED)
@pytest.mark.parametrize("s", [0, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_unaligned_sizes_and_biases(path: str, s: int, bias: bool) -> None:
    ffn = make_ffn(n=3, k=2, h=7, s=s, d=13, bias=bias)
    for tokens in (1, 11):
        check(ffn, path, tokens_for(ffn, tokens))


def test_grouped_with_biases() -> None:
    ffn = make_ffn(n=4, k=2, h=8, s=8, bias=True)
    check(ffn, "grouped", tokens_for(ffn, 11))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("k", [0, 4])
def test_static_pruning_and_all_experts(path: str, k: int) -> None:
    ffn = make_ffn(n=4, k=k, h=8, s=8, bias=True)
    for tokens in (1, 9):
        check(ffn, path, tokens_for(ffn, tokens))


@pytest.mark.parametrize("path", PATHS)
def test_one_expert_takes_all_and_others_stay_empty(path: str) -> None:
    ffn = make_ffn(n=4, k=1, h=8)
    with torch.no_grad():
        ffn.router.zero_()
        ffn.router[2, 0] = 1.0
    x_TD = tokens_for(ffn, 21)
    x_TD[:, 0] = x_TD[:, 0].abs() + 1
    check(ffn, path, x_TD)
    assert ffn.route(x_TD).ids_TK.unique().tolist() == [2]


@pytest.mark.parametrize("path", PATHS)
def test_ties_choose_k_different_experts(path: str) -> None:
    ffn = make_ffn(n=4, k=2, h=8)
    with torch.no_grad():
        ffn.router.zero_()
    check(ffn, path, tokens_for(ffn, 6))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tokens", [1, 9, 65])
def test_bfloat16(path: str, tokens: int) -> None:
    ffn = make_ffn(n=4, k=2, h=32, s=16, d=64, dtype=torch.bfloat16)
    ffn.path = path
    x_TD = tokens_for(ffn, tokens)
    expected = plain_loop(make_exact(ffn), x_TD.double(), choice(ffn, x_TD))
    assert error(ffn(x_TD), expected) < 1e-2


@pytest.mark.parametrize("path", PATHS)
def test_inference_mode_and_batched_input(path: str) -> None:
    ffn = make_ffn(n=4, k=2, h=8, s=8, bias=True)
    ffn.path = path
    x_TD = tokens_for(ffn, 12)
    with torch.inference_mode():
        batched = ffn(x_TD.view(3, 4, -1))
    expected = plain_loop(make_exact(ffn), x_TD.double(), choice(ffn, x_TD))
    assert batched.shape == (3, 4, ffn.hidden_size)
    assert error(batched.view(12, -1), expected) < 1e-5


@pytest.mark.parametrize("path", ["masked", "loop", "grouped", "slot"])
def test_autocast_trains_float32_weights(path: str) -> None:
    ffn = make_ffn(n=4, k=2, h=8, s=8)
    ffn.path = path
    x_TD = tokens_for(ffn, 9)
    with torch.autocast("cpu", torch.bfloat16):
        y_TD = ffn(x_TD)
    y_TD.float().sum().backward()
    expected = plain_loop(make_exact(ffn), x_TD.double(), choice(ffn, x_TD))
    assert error(y_TD, expected) < 5e-2
    assert ffn.gate_up.grad is not None
    assert ffn.gate_up.grad.dtype == torch.float32


@pytest.mark.parametrize("path", PATHS)
def test_paths_meant_for_gpus_never_look_at_a_value(path: str) -> None:
    """Neither forward nor backward: fake tensors have sizes and no values, so who asks for one is found out."""
    with FakeTensorMode():
        ffn = FactoredFFN(FactorShape(4, 2, 8, 8), 16, "silu", dtype=torch.bfloat16)
        ffn.path = path
        x_TD = torch.empty(9, 16, dtype=torch.bfloat16)
        if path == "loop":
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                ffn(x_TD)
            return
        ffn(x_TD).sum().backward()
        assert all(parameter.grad is not None for parameter in ffn.parameters())


@pytest.mark.parametrize("path", ["masked", "slot", "grouped", "dense"])
@pytest.mark.parametrize("tokens", [1, 8])
def test_compiles_to_a_full_graph(path: str, tokens: int) -> None:
    # torch's grouped_mm compiles for bf16 only.
    dtype = torch.bfloat16 if path == "grouped" else torch.float32
    ffn = make_ffn(n=4, k=4 if path == "dense" else 2, h=8, s=8, dtype=dtype)
    ffn.path = path
    torch._dynamo.reset()
    compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager")
    x_TD = tokens_for(ffn, tokens)
    with torch.no_grad():
        for x in (x_TD, -x_TD):  # the same graph with other experts
            assert error(compiled(x), ffn(x).double()) < 10 * torch.finfo(dtype).eps


def test_grouped_compiles_around_products_that_torch_cannot_trace() -> None:
    ffn = make_ffn(n=4, k=2, h=8, s=8)
    ffn.path = "grouped"
    torch._dynamo.reset()
    compiled = torch.compile(ffn, backend="aot_eager")
    x_TD = tokens_for(ffn, 9)
    expected, found = (forward_and_gradients(run, ffn, x_TD) for run in (ffn, compiled))
    assert all(error(found[name], value.double()) < 1e-6 for name, value in expected.items())


@pytest.mark.parametrize("path", ["masked", "slot"])
@pytest.mark.parametrize(("n", "k"), [(4, 1), (4, 2), (64, 8)])
def test_compiled_routing_fuses_and_prefers_the_lower_of_equal_experts(path: str, n: int, k: int) -> None:
    targets: set[str] = set()

    def note_operations(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        targets.update(str(node.target) for node in graph.graph.nodes)
        return graph

    ffn = make_ffn(n=n, k=k, h=8, s=8).requires_grad_(False)
    ffn.path = path
    with torch.no_grad():
        ffn.router[1::2] = ffn.router[::2]  # pairs of equal experts
    torch._dynamo.reset()
    compiled = torch.compile(ffn, fullgraph=True, backend=note_operations)
    x_TD = tokens_for(ffn, 3)
    logits_TN = ffn.router_logits(x_TD)
    lower_first = logits_TN.sort(descending=True, stable=True).indices[:, :k]
    assert error(compiled(x_TD), plain_loop(make_exact(ffn), x_TD.double(), lower_first)) < 1e-6
    assert "argmax" in targets
    assert not {name for name in targets if name in ("topk", "scatter", "sort")}, targets


@pytest.mark.parametrize("path", PATHS)
def test_the_layout_in_memory_changes_nothing_else(path: str) -> None:
    ffn = make_ffn(n=4, k=2, h=8, s=8, bias=True)
    before = ffn.down.detach().clone()
    ffn.down.data = ffn.down.data.t().contiguous().t()
    assert torch.equal(ffn.down, before)
    assert ffn.down.stride() == (1, ffn.hidden_size)
    for tokens in (1, 2, 65):
        check(ffn, path, tokens_for(ffn, tokens))


@pytest.mark.parametrize(("k", "dtype"), [(4, torch.float32), (2, torch.float64)])
def test_rows_stay_rows_where_they_are_faster(k: int, dtype: torch.dtype) -> None:
    ffn = make_ffn(n=4, k=k, h=8, s=8, dtype=dtype)
    ffn.keep_experts_together()
    assert ffn.down.is_contiguous()


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_on_is_kept_together_for_the_kernel(
    dtype: torch.dtype, kernel: bool, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_kernel, "is_available", lambda: kernel)
    ffn = make_ffn(n=4, k=k, h=8, s=8, dtype=dtype)
    ffn.keep_experts_together()
    assert ffn.down.is_contiguous() != kernel


@pytest.mark.parametrize("k", [0, 2, 4])
def test_auto_compiles_to_a_full_graph_once_per_token_count(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_choice, "shipped_steps", path_choice._gpu_steps)  # a CPU's paths read on the host
    tuned_paths.forget()
    ffn = make_ffn(n=4, k=k, h=8, s=8)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ffn, fullgraph=True, backend=counter, dynamic=False)
    with torch.no_grad():
        for seed in range(3):
            compiled(tokens_for(ffn, 1, seed))
    assert counter.frame_count == 1
    tuned_paths.forget()


def test_paths_that_do_not_fit_say_what_to_choose() -> None:
    ffn = make_ffn(n=4, k=2, h=7, d=13)
    ffn.path = "dense"
    with pytest.raises(UsageError, match="path 'dense' runs all 4 experts, but top-k is 2"):
        ffn(tokens_for(ffn, 3))
    ffn.path = "grouped"
    with pytest.raises(UsageError, match=r"rows of a multiple of 16 bytes; D, H, S are \(13, 7, 0\) of float32"):
        ffn(tokens_for(ffn, 3))
    double = make_ffn(n=4, k=2, h=8, dtype=torch.float64)
    double.path = "grouped"
    with pytest.raises(UsageError, match=r"takes float32, bfloat16, float16 in rows .* of float64\nHint: .*'masked'"):
        double(tokens_for(double, 3))


def test_groups_are_stable_and_complete() -> None:
    ids_TK = torch.tensor([[2, 0], [2, 1], [0, 2]])
    groups = group_by_expert(ids_TK)
    assert groups.expert_P.tolist() == [0, 0, 1, 2, 2, 2]
    assert groups.token_P.tolist() == [0, 2, 1, 0, 1, 2]
    assert ids_TK.flatten()[groups.order_P].tolist() == groups.expert_P.tolist()


def test_no_path_warns() -> None:
    ffn = make_ffn(n=4, k=2, h=8)
    for path in PATHS:
        ffn.path = path
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ffn(tokens_for(ffn, 5))
