"""What a GGUF file says of itself, for sources of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from factorctl.exporting.gguf.identity import identity_of
from factorctl.exporting.origin import base_name
from factorctl.exporting.stock.shards import PlannedTensor

TENSORS = [
    PlannedTensor(0, "token_embd.weight", (1000, 1000), 0),
    PlannedTensor(1, "blk.0.ffn_up_exps.weight", (4, 1000, 1000), 0),
]


@pytest.mark.parametrize(
    ("source", "config", "expected"),
    [
        ({"id": "HuggingFaceTB/SmolLM2-135M", "kind": "hub"}, {}, ("SmolLM2-135M", "HuggingFaceTB")),
        ({"id": "my-model", "kind": "local"}, {}, ("my-model", None)),
        ({"id": "tiny.Q4_0.gguf", "kind": "gguf"}, {}, ("tiny.Q4_0", None)),
        ({"id": "pypi:llm-tiny==0.1", "kind": "wheel"}, {"_model_name_or_path": "Tiny 135M"}, ("Tiny 135M", None)),
        ({"id": "pypi:llm-tiny==0.1", "kind": "wheel"}, {"_name_or_path": "/home/me/x"}, ("llm-tiny", None)),
    ],
)
def test_names_are_to_be_read(source: dict[str, Any], config: dict[str, Any], expected: tuple[str, str]) -> None:
    assert base_name(source, config) == expected


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("\n   Apache License\n   Version 2.0, January 2004\n", "apache-2.0"),
        ("MIT License\n\nCopyright", "mit"),
        ("Community agreement", None),
    ],
)
def test_size_licence_and_base_model(text: str, licence: str | None, tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text(text)
    source = {"id": "org/Model-1B", "kind": "hub"}
    found = identity_of(source, {}, [tmp_path / "LICENSE"], TENSORS, notation="1R4E2K", num_experts=4)
    assert found.name == "Model-1B 1R4E2K"
    assert found.base_url == "https://huggingface.co/org/Model-1B"
    assert found.licence == licence
    assert found.size == "4x2.0M"
    stated = identity_of(source, {"license": "other"}, [], TENSORS, notation="1R4E2K", num_experts=4)
    assert stated.licence == "other"
