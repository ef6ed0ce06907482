"""A model's linear layers, run by `factorctl.ffn.few_token_linear` or by torch."""

from __future__ import annotations

import torch
from torch import nn

from factorctl.ffn.few_token_linear import linear


class FewTokenLinear(nn.Linear):
    """`nn.Linear` by `linear`: the same parameters under the same names."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight, self.bias)


def use_few_token_linears(model: nn.Module) -> None:
    """Turn every plain `nn.Linear` of a model (attention's projections, the head) into a `FewTokenLinear`."""
    _exchange(model, nn.Linear, FewTokenLinear)


def use_stock_linears(model: nn.Module) -> None:
    """The way back."""
    _exchange(model, FewTokenLinear, nn.Linear)


def _exchange(model: nn.Module, old: type[nn.Linear], new: type[nn.Linear]) -> None:
    for name, module in list(model.named_modules()):
        if type(module) is old:
            model.set_submodule(name, _with_the_weights_of(module, new))


def _with_the_weights_of(module: nn.Linear, new: type[nn.Linear]) -> nn.Linear:
    """The same parameters, not copies: weights that are tied stay so."""
    made = new(module.in_features, module.out_features, module.bias is not None, device="meta")
    made.weight, made.bias = module.weight, module.bias
    return made.train(module.training)
