"""Reading a quantised GGUF file back: faults that a look at names and shapes would not see."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType

from factorctl.exporting.check.gguf_proof import _mixed_fault

NAME = "blk.0.ffn_up_exps.weight"


def stored(tensor: torch.Tensor, kind: GGMLQuantizationType) -> Any:
    return SimpleNamespace(name=NAME, tensor_type=kind, data=gguf.quantize(tensor.float().numpy(), kind))


@pytest.fixture
def experts_NHD() -> torch.Tensor:
    return torch.randn(4, 8, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_rounding_is_no_fault(kind: str, experts_NHD: torch.Tensor) -> None:
    assert _mixed_fault(stored(experts_NHD, GGMLQuantizationType[kind]), experts_NHD) is None


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "F16", "F32"])
def test_two_experts_exchanged_are(kind: str, experts_NHD: torch.Tensor) -> None:
    exchanged = experts_NHD[[0, 2, 1, 3]]
    fault = _mixed_fault(stored(exchanged, GGMLQuantizationType[kind]), experts_NHD)
    assert fault is not None
    assert ("off by 1." in fault) or fault == "was not stored whole"


def test_an_expert_of_zeros_is_one(experts_NHD: torch.Tensor) -> None:
    emptied = experts_NHD.clone()
    emptied[3] = 0
    fault = _mixed_fault(stored(emptied, GGMLQuantizationType.Q8_0), experts_NHD)
    assert fault == "is off by 1 of its norm as Q8_0, which may be 0.02"


def test_a_type_that_no_mixture_here_has_is_one(experts_NHD: torch.Tensor) -> None:
    found = SimpleNamespace(name=NAME, tensor_type=GGMLQuantizationType.IQ2_XS, data=None)
    assert _mixed_fault(found, experts_NHD) == "is IQ2_XS, which no mixture here has"
