"""The options of `factorctl eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from factorctl.config.common import TEXT_FIELD, CommonConfig
from factorctl.config.kinds import AUTO_OR_WHOLE, TEXT, TOKENS, TOKENS_OR_0, Listed
from factorctl.config.option import Option

Controls = Literal["none", "fast", "all"]


@dataclass(frozen=True)
class EvalConfig(CommonConfig):
    """`factorctl eval`."""

    checkpoint: Annotated[
        str | None,
        Option(
            "A checkpoint, export, Hugging Face directory or Hub id. [default: the newest in the workspace]",
            role="place",
            metavar="CKPT",
            positional=True,
        ),
    ] = None
    tasks: Annotated[
        tuple[str, ...],
        Option(
            "lm-eval tasks, a list; paper stands for FactorLLM's eight.", kind=Listed(TEXT, "tasks", "piqa,arc_easy")
        ),
    ] = ()
    task_data: Annotated[Path | None, Option("Directory with TASK.jsonl files, instead of the Hub.")] = None
    data: Annotated[tuple[str, ...], Option("Text for perplexity: files, folder, Hub dataset; may be repeated.")] = ()
    text_field: Annotated[str | None, TEXT_FIELD] = None
    data_tokens: Annotated[int, Option("Tokens taken from each text: 100K.", kind=TOKENS, least=1)] = 100_000
    document_tokens: Annotated[
        int | None, Option("Tokens from the beginning of each document. [default: all]", kind=TOKENS_OR_0, least=1)
    ] = None
    window: Annotated[
        int, Option("Tokens that a prediction may look at; at most the model's context.", kind=TOKENS_OR_0)
    ] = 1024
    stride: Annotated[
        int | None, Option("Tokens between two windows. [default: half the window]", kind=TOKENS_OR_0)
    ] = None
    controls: Annotated[
        Controls,
        Option(
            "Which controls are measured beside the model.",
            flags={
                "--controls": (
                    "fast",
                    "Also static pruning, with and without refit, random and oracle routing, all experts on.",
                ),
                "--controls-all": ("all", "The same, and FFN-SkipLLM, MoEfication's split and KnowledgeFactor."),
            },
        ),
    ] = "none"
    calibration: Annotated[
        str | None, Option("Text that controls are calibrated on. [default: the checkpoint's, or self]")
    ] = None
    calibration_tokens: Annotated[
        int | None,
        Option("Tokens of it. [default: as many as the checkpoint's, or 16,384]", kind=TOKENS, least=1),
    ] = None
    fidelity: Annotated[bool, Option("Hold every factored FFN against its dense one.")] = True
    against: Annotated[str | None, Option("Model to compare with. [default: the dense source in the manifest]")] = None
    """In the same forms as `checkpoint`."""
    limit: Annotated[int | None, Option("Documents per task. [default: all]", least=1)] = None
    few_shot: Annotated[
        int | None,
        Option(
            "Examples before each question. [default: the task's own number]", least=0, hint="choose 0 or more examples"
        ),
    ] = None
    batch_size: Annotated[
        int | Literal["auto"],
        Option("Sequences at once in tasks; auto finds what memory holds.", kind=AUTO_OR_WHOLE, least=1),
    ] = "auto"
    samples: Annotated[Path | None, Option("Directory for samples_*.jsonl. [default: --out]", role="place")] = None
    report: Annotated[Path | None, Option("Write a Markdown report here.", role="place")] = None
    resume: Annotated[bool, Option("Keep what an interrupted run finished and is still the same.", role="place")] = (
        False
    )
    out: Annotated[
        Path | None,
        Option("Directory of results.json, answers and picture. [default: in the workspace]", short="-o", role="place"),
    ] = None

    @property
    def calibrated_on(self) -> int:
        """Tokens for controls, once the checkpoint has told how many it was calibrated on itself."""
        assert self.calibration_tokens is not None, "resolved"
        return self.calibration_tokens
