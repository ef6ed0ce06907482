"""The options of `factorctl export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from factorctl.config.common import CommonConfig, require_positive

ExportTarget = Literal["hf", "gguf", "dense", "bnb-4bit", "bnb-8bit"]
Arch = Literal["auto", "mixtral", "granite-moe-shared", "granite-moe-hybrid", "qwen2-moe", "qwen3-moe", "glm4-moe"]


@dataclass(frozen=True)
class ExportConfig(CommonConfig):
    """`factorctl export`."""

    checkpoint: Path | None = None
    """A native checkpoint; None means the newest in the workspace."""
    target: ExportTarget = "hf"
    arch: Arch = "auto"
    """Stock transformers architecture; auto is the one that most engines run right."""
    pad_experts: int | Literal["auto"] = "auto"
    """Experts get neurons of zeros up to a multiple of this; auto: of 32 where an engine or a storage type asks it."""
    quant: str = "auto"
    """GGUF storage type; auto keeps the export's dtype (f32, f16 or bf16)."""
    exact: bool = False
    """Refuse whatever is only near the native function (gate `hard` at K > 1)."""
    untie_lm_head: bool = False
    max_shard_bytes: int = 2_000_000_000
    """Also bounds memory: one shard is built at a time."""
    verify_gguf: bool = False
    """Demand that llama.cpp itself runs the file before it is published."""
    accept_difference: float | None = None
    """KL in nats per token up to which rounding may move the model; None leaves near ties out of the judgement."""
    push: str | None = None
    """Hub repository that the finished export is uploaded to."""
    private: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("--pad-experts", None if self.pad_experts == "auto" else self.pad_experts, "1 adds none")
