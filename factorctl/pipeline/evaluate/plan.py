"""What `eval` decides before it loads a weight: models, texts, tasks, controls, memory, and the parts of the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from factorctl import __version__
from factorctl.checkpoint.reader import CheckpointReader
from factorctl.config.evaluate import EvalConfig
from factorctl.config.option import EVERY_ROLE, recorded
from factorctl.data.hub import pin_revisions
from factorctl.data.identity import identify_sources, tokenizer_fingerprint
from factorctl.data.spec import parse_data_spec
from factorctl.errors import UsageError
from factorctl.evaluation.chunked_head import CHUNK_POSITIONS
from factorctl.evaluation.fidelity import LayerFidelity
from factorctl.evaluation.perplexity import BATCH_TOKENS, DocumentLoss, check_windowing
from factorctl.memory import PROCESS_BYTES, free_memory, require_memory
from factorctl.models.families import read_dense_model
from factorctl.pipeline.common.devices import compute_dtype, torch_device
from factorctl.pipeline.common.provenance import library_versions
from factorctl.pipeline.common.recorded_source import holds_dense_values
from factorctl.pipeline.common.subjects import (
    ComparedModel,
    find_checkpoint,
    find_reference,
    is_source_of,
    shared_tokenizer,
)
from factorctl.pipeline.common.time_estimate import gemm_rate
from factorctl.pipeline.common.workspace import refuse_directory, report_directory
from factorctl.pipeline.evaluate.controls import CONTROLS, calibration_text, calibration_tokens, chosen_controls
from factorctl.pipeline.evaluate.parts import Measurement
from factorctl.pipeline.evaluate.texts import EvalText, read_text, text_names
from factorctl.progress import Progress

if TYPE_CHECKING:
    from factorctl.evaluation.tasks import TaskPlan

LM_EVAL_BYTES = 200_000_000
"""What lm-eval and its imports add to the resident size of the process."""
DOCUMENT_TOKENS = 250


@dataclass(frozen=True)
class EvalPlan:
    """Everything that is decided before the first weight is read."""

    config: EvalConfig
    model: ComparedModel
    reference: ComparedModel
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    device: torch.device
    texts: list[EvalText]
    tasks: list[TaskPlan]
    controls: list[str]
    fidelity: bool
    window: int
    stride: int
    out: Path
    memory_bytes: int
    calibration: list[dict[str, Any]] | None
    """What the controls' calibration text is made of; None where none is read."""
    remarks: list[str] = field(default_factory=list)

    @property
    def subjects(self) -> list[str]:
        """The models in the order in which they are measured, one in memory at a time."""
        return ["dense", "model", *self.controls]

    def parts(self, subject: str) -> list[Measurement]:
        """The measurements of one of them."""
        common = self._identity_of(subject)
        parts = [
            Measurement(subject, "perplexity", text.name, common | self._text_identity(text)) for text in self.texts
        ]
        for task in self.tasks:
            parts.append(Measurement(subject, "task", task.name, {**common, "task": self._task_identity(task)}))
        if subject == "model" and self.fidelity:
            text = self.texts[0]
            identity = common | self._text_identity(text) | {"reference": self.reference.sha256}
            identity |= {"holds": _field_names(LayerFidelity)}
            parts.append(Measurement(subject, "fidelity", text.name, identity))
        return parts

    def _identity_of(self, subject: str) -> dict[str, Any]:
        """All that decides what the model computes."""
        common: dict[str, Any] = {
            "subject": subject,
            "weights": self.reference.sha256 if subject == "dense" else self.model.sha256,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "libraries": library_versions(),
            "tool_version": __version__,
        }
        if subject in CONTROLS:
            common |= {"reference": self.reference.sha256, "seed": self.config.seed}
            if (version := CONTROLS[subject].version) > 1:
                common["version"] = version
            if CONTROLS[subject].calibrates:
                common |= {"calibration": self.calibration, "calibration_tokens": self.config.calibrated_on}
        return common

    def _text_identity(self, text: EvalText) -> dict[str, Any]:
        holds = _field_names(DocumentLoss)
        return {"text": dict(text.identity), "window": self.window, "stride": self.stride, "holds": holds}

    def _task_identity(self, task: TaskPlan) -> dict[str, Any]:
        config = self.config
        return {
            "fingerprint": task.fingerprint,
            "limit": config.limit,
            "few_shot": task.few_shot(config.few_shot),
            "seed": config.seed,
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
        }


def _field_names(kind: type) -> list[str]:
    """What a part of this kind holds: parts that another version wrote hold other figures."""
    return [item.name for item in fields(kind)]


def plan_evaluation(config: EvalConfig, progress: Progress) -> EvalPlan:
    """Resolve and check all that can be checked without reading weights.

    Raises:
        UsageError: an option does not fit, or there is nothing to evaluate.
        IntegrityError: the checkpoint is damaged.
        ResourceError: memory or device do not suffice.
    """
    if not config.data and not config.tasks:
        raise UsageError(
            "there is nothing to evaluate on", "give text for perplexity (--data DATA), tasks (--tasks paper), or both"
        )
    remarks: list[str] = []
    device = torch_device(config.device)
    model = find_checkpoint(config, progress)
    config = replace(config, calibration_tokens=calibration_tokens(config, model))
    reference = find_reference(config, model, progress)
    tokenizer = shared_tokenizer(model, reference)
    out = report_directory(config.out, config.workspace, str(model.path.resolve()), "eval")
    refuse_directory("--report", config.report, "report.md")
    window, stride = windowing(config, model, reference)
    controls = _controls(config, model, reference, remarks)
    dtype = compute_dtype(config.dtype, model.path, device, remarks)
    texts = [read_text(name, given, config, tokenizer, progress) for name, given in text_names(config.data).items()]
    tasks = _tasks(config, remarks, progress)
    calibration = _calibration(config, model, controls, progress)
    needed = expected_memory(model, reference, dtype, window=window, controls=controls, tasks=bool(tasks))
    hint = "choose --dtype bfloat16, leave out --controls, or use a machine with more memory"
    require_memory(needed, free_memory(device), hint=hint)
    return EvalPlan(
        config=config,
        model=model,
        reference=reference,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        texts=texts,
        tasks=tasks,
        controls=controls,
        fidelity=_can_measure_fidelity(config, model, reference, remarks),
        window=window,
        stride=stride,
        out=out,
        memory_bytes=needed,
        calibration=calibration,
        remarks=remarks,
    )


def windowing(config: EvalConfig, model: ComparedModel, reference: ComparedModel) -> tuple[int, int]:
    """(window, stride): the window no longer than the default or the models' context allows."""
    contexts = [one.context for one in (model, reference) if one.context is not None]
    context = min(contexts, default=None)
    window = config.window
    if context is not None and window == EvalConfig.window:
        window = min(window, context)
    stride = max(1, window // 2) if config.stride is None else config.stride
    check_windowing(window, stride, context)
    return window, stride


def _tasks(config: EvalConfig, remarks: list[str], progress: Progress) -> list[TaskPlan]:
    if not config.tasks:
        return []
    from factorctl.evaluation.tasks import resolve_tasks  # lm-eval takes seconds to import

    plans = resolve_tasks(config.tasks, task_data=config.task_data, few_shot=config.few_shot, progress=progress)
    remarks += [note for plan in plans for note in plan.notes]
    return plans


def _controls(config: EvalConfig, model: ComparedModel, reference: ComparedModel, remarks: list[str]) -> list[str]:
    if config.controls == "none":
        return []
    if model.native is None:
        raise UsageError(
            f"{model.path} is no native checkpoint: controls need its experts and its number of active neurons",
            "evaluate the native checkpoint it was made from, or leave out --controls",
        )
    if not is_source_of(model, reference):
        raise UsageError(
            f"controls are made from the dense source of {model.path}, and {reference.path} is another model",
            "leave out --against, or --controls",
        )
    chosen = chosen_controls(config.controls, model.native.spec)
    if not chosen:
        remarks.append("all experts are on: nothing is left out, so every control would be the dense model")
    return chosen


def _calibration(
    config: EvalConfig, model: ComparedModel, controls: Sequence[str], progress: Progress
) -> list[dict[str, Any]] | None:
    """What identifies the calibration text, read before the work starts so that a missing file is found now."""
    if not any(CONTROLS[name].calibrates for name in controls):
        return None
    calibration, text_field = calibration_text(config, model)
    spec = pin_revisions(parse_data_spec(calibration, text_field=text_field, option="--calibration"))
    return [{**record, "text_field": text_field} for record in identify_sources(spec, None, progress)]


def _can_measure_fidelity(
    config: EvalConfig, model: ComparedModel, reference: ComparedModel, remarks: list[str]
) -> bool:
    if not config.fidelity or model.native is None:
        return False
    if not config.data:
        remarks.append("layer fidelity was not measured: it needs text (--data)")
        return False
    if not is_source_of(model, reference):
        remarks.append("layer fidelity was not measured: --against is not the dense source of the checkpoint")
        return False
    return True


def expected_memory(
    model: ComparedModel,
    reference: ComparedModel,
    dtype: torch.dtype,
    *,
    window: int,
    controls: Sequence[str],
    tasks: bool,
) -> int:
    """Bytes of the largest model in the compute dtype, with what a batch needs beside it."""
    values = max(CheckpointReader(one.path).num_values for one in (model, reference))
    if "oracle_routing" in controls and not holds_dense_values(model.native.manifest):  # type: ignore[union-attr]
        dense = read_dense_model(reference.path)
        values += 3 * dense.num_layers * dense.hidden_size * dense.intermediate_size
    head = 3 * CHUNK_POSITIONS * reference.vocabulary * 4
    hidden = 64 * max(BATCH_TOKENS, window) * 1024 * 4
    process = PROCESS_BYTES + (LM_EVAL_BYTES if tasks else 0)
    return process + values * dtype.itemsize + head + hidden


def expected_seconds(plan: EvalPlan) -> float:
    """About how long everything takes if nothing was done before: arithmetic over a rate measured on the spot.

    A document of a task is taken to be `DOCUMENT_TOKENS` long with all its choices, so this tells minutes from hours.
    """
    overlap = plan.window / plan.stride
    scored = overlap * sum(text.tokens for text in plan.texts)
    scored += DOCUMENT_TOKENS * sum(min(task.documents, plan.config.limit or task.documents) for task in plan.tasks)
    calibrated = plan.config.calibrated_on * sum(2 for name in plan.controls if CONTROLS[name].calibrates)
    tokens = len(plan.subjects) * scored + calibrated
    return 2 * CheckpointReader(plan.reference.path).num_values * tokens / gemm_rate(plan.device)


def resolved_config(plan: EvalPlan) -> dict[str, Any]:
    """The configuration as JSON, defaults resolved."""
    return {
        **recorded(plan.config, *EVERY_ROLE),
        "checkpoint": str(plan.model.path),
        "against": plan.reference.id,
        "out": str(plan.out),
        "window": plan.window,
        "stride": plan.stride,
        "tasks": [task.name for task in plan.tasks],
    }
