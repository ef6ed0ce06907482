"""The options of `factorctl eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from factorctl.config.common import CommonConfig, require_positive
from factorctl.errors import UsageError

Controls = Literal["none", "fast", "all"]


@dataclass(frozen=True)
class EvalConfig(CommonConfig):
    """`factorctl eval`."""

    checkpoint: str | None = None
    """A native checkpoint, an export, any Hugging Face directory or Hub id; None means the newest in the workspace."""
    against: str | None = None
    """What it is compared with, in the same forms; None means the dense source that the manifest records."""
    tasks: tuple[str, ...] = ()
    """lm-eval tasks; `paper` stands for FactorLLM's eight."""
    task_data: Path | None = None
    """Directory with one JSONL per task, for where no Hub can be reached."""
    data: tuple[str, ...] = ()
    """Texts for perplexity, each a DATA of its own."""
    text_field: str | None = None
    data_tokens: int = 100_000
    """Tokens taken from each text."""
    document_tokens: int | None = None
    """Tokens taken from the beginning of each document; None means all of it."""
    window: int = 1024
    """Tokens that a prediction may look at, its own window's; less where the model's context is shorter."""
    stride: int | None = None
    """Tokens between the starts of two windows; None means half a window."""
    fidelity: bool = True
    """Hold every factored FFN against its dense one."""
    controls: Controls = "none"
    calibration: str | None = None
    """Text that controls are calibrated on; None means what the checkpoint was calibrated on, else `self`."""
    calibration_tokens: int = 16_384
    limit: int | None = None
    """Documents per task; None means all."""
    few_shot: int | None = None
    """Examples before each question; None means the task's own number."""
    batch_size: int | Literal["auto"] = "auto"
    """Sequences at once in tasks; auto finds what memory holds."""
    samples: Path | None = None
    """Directory for the answers to every document; None means `out`."""
    report: Path | None = None
    """File for the Markdown report."""
    resume: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("--limit", self.limit)
        require_positive("--data-tokens", self.data_tokens)
        require_positive("--document-tokens", self.document_tokens)
        require_positive("--calibration-tokens", self.calibration_tokens)
        require_positive("--batch-size", None if self.batch_size == "auto" else self.batch_size)
        if self.few_shot is not None and self.few_shot < 0:
            raise UsageError(f"--few-shot {self.few_shot} is out of range", "choose 0 or more examples")
