"""The banded products against `F.linear`, and where each is used."""

from __future__ import annotations

import pytest
import torch
from conftest import DenseSource
from torch import nn
from torch.nn import functional as F

from factorctl.ffn.few_token_linear import MAX_TOKENS, bands_for, in_bands, linear
from factorctl.ffn.kernel import cpu as cpu_kernel
from factorctl.models.linears import FewTokenLinear, use_few_token_linears, use_stock_linears
from factorctl.models.loading import load_dense


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def columns_together(weight: torch.Tensor) -> torch.Tensor:
    """The same values, column after column in memory."""
    return weight.t().contiguous().t()


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("tokens", [1, 2, 7, 128])
@pytest.mark.parametrize("bands", [2, 8])
def test_bands_make_up_the_product(tokens: int, bands: int) -> None:
    x, weight = draw(tokens, 48), draw(32, 48, seed=1)
    expected = F.linear(x.double(), weight.double())
    for layout in (weight, columns_together(weight)):
        y = in_bands(x, layout, bands)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
        assert y.is_contiguous(), "what follows would have to stride"


@pytest.mark.parametrize("tokens", [2, 3])
def test_a_slice_of_columns(tokens: int) -> None:
    x, weight = draw(tokens, 16), draw(8, 64, seed=1)[:, 16:32]
    assert not weight.is_contiguous()
    torch.testing.assert_close(in_bands(x, weight, 4), F.linear(x, weight))


@pytest.mark.parametrize("tokens", [2, 3])
def test_gradients_flow_through_bands(tokens: int) -> None:
    inputs = [draw(tokens, 6).double().requires_grad_(), draw(8, 6, seed=1).double().requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, w: in_bands(x, w, 4), inputs)


@pytest.mark.usefixtures("two_threads")
def test_where_weights_are_cut() -> None:
    weight = draw(2048, 256)
    assert [bands_for(draw(tokens, 256), weight) for tokens in (1, MAX_TOKENS, MAX_TOKENS + 1)] == [2, 2, 1]
    assert bands_for(draw(0, 256), weight) == 1
    assert bands_for(draw(1, 256), weight[:100]) == 1, "small"
    assert bands_for(draw(1, 256), weight[:2047]) == 1, "an odd number of rows"
    assert bands_for(draw(1, 256).bfloat16(), weight.bfloat16()) == 1
    assert bands_for(draw(1, 256), weight.clone().requires_grad_()) == 1, "training"
    with torch.autocast("cpu", torch.bfloat16):
        assert bands_for(draw(1, 256), weight) == 1


def test_one_thread_has_nobody_to_share_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert bands_for(draw(1, 256), draw(512, 256)) == 1


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("kernel", [False, True])
def test_linear_is_the_product_either_way(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernel:
        monkeypatch.setattr(cpu_kernel, "is_available", lambda: False)
    weight, bias = draw(512, 256), draw(512, seed=1)
    for tokens in (1, 3, MAX_TOKENS + 1):
        for layout in (weight, columns_together(weight)):
            x = draw(tokens, 1, 256, seed=2)
            torch.testing.assert_close(linear(x, layout, bias), F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)


def test_modules_change_and_change_back() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4), nn.ReLU())
    before = {name: id(p) for name, p in model.named_parameters()}
    x = draw(3, 4)
    expected = model(x)
    use_few_token_linears(model)
    assert [type(module) for module in model] == [FewTokenLinear, Own, nn.ReLU]
    assert torch.equal(model(x), expected)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    use_stock_linears(model)
    assert [type(module) for module in model] == [nn.Linear, Own, nn.ReLU]


def test_loaded_models_run_on_them(dense_source: DenseSource) -> None:
    model = load_dense(dense_source())
    attention = model.model.layers[0].self_attn
    assert {type(module) for module in (model.lm_head, attention.q_proj, attention.o_proj)} == {FewTokenLinear}
