"""Looking at modules while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def watched(
    modules: Iterable[nn.Module], *, before: Callable[..., Any] | None = None, after: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Call `before(module, inputs)` and `after(module, inputs, output)` whenever one of them runs in the block."""
    with ExitStack() as hooks:
        for module in modules:
            if before is not None:
                hooks.callback(module.register_forward_pre_hook(before).remove)
            if after is not None:
                hooks.callback(module.register_forward_hook(after).remove)
        yield
