"""What `try` decides before it loads a weight: the two models, what runs them, and the prompts."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from factorctl.checkpoint.aliases import ALIASES
from factorctl.checkpoint.reader import CheckpointReader
from factorctl.config.option import EVERY_ROLE, recorded
from factorctl.config.trial import TryConfig
from factorctl.errors import UsageError
from factorctl.memory import PROCESS_BYTES, free_memory, require_memory
from factorctl.models.loading import holds_quantised_experts
from factorctl.pipeline.common.devices import compute_dtype, torch_device
from factorctl.pipeline.common.subjects import (
    ComparedModel,
    find_checkpoint,
    find_reference,
    is_plain_dense,
    shared_tokenizer,
)
from factorctl.pipeline.common.workspace import refuse_directory
from factorctl.pipeline.trial.engines import Sampling
from factorctl.pipeline.trial.gguf_model import GgufModel, find_gguf, require_same_vocabulary, require_the_cpu
from factorctl.pipeline.trial.prompts import Prompt, prepare, read_prompts, takes_chat
from factorctl.progress import Progress

Runtime = Literal["factorctl", "transformers", "bitsandbytes", "llama.cpp"]
"""What runs a model: factorctl's FFNs in transformers, transformers alone, it with experts in few bits, llama.cpp."""


@dataclass(frozen=True)
class TryPlan:
    """Everything that is decided before the first weight is read."""

    config: TryConfig
    model: ComparedModel
    reference: ComparedModel
    gguf: GgufModel | None
    """The file that takes the model's place."""
    runtimes: tuple[Runtime, Runtime]
    """Of the dense model and of the other."""
    tokenizer: PreTrainedTokenizerBase
    chat: bool
    context: int | None
    """Positions that both models know."""
    sampling: Sampling
    prompts: list[Prompt]
    """Those that are known by now; none where they are read line by line."""
    dtype: torch.dtype
    device: torch.device
    memory_bytes: int
    remarks: list[str] = field(default_factory=list)

    @property
    def same_runtime(self) -> bool:
        """Whether a difference in speed is one between the models."""
        return _comparable(self.runtimes)

    def prepare(self, text: str) -> Prompt:
        """Raises:
        UsageError: the prompt cannot be given to both models.
        """
        return prepare(
            text,
            self.tokenizer,
            chat=self.chat,
            context=self.context,
            max_new_tokens=self.sampling.max_new_tokens,
        )


def plan_try(config: TryConfig, progress: Progress) -> TryPlan:
    """Resolve and check all that can be checked without reading weights.

    Raises:
        UsageError: a model or prompt is not there, or does not fit.
        IntegrityError: a file is not what its manifest says.
        ResourceError: memory or device do not suffice.
    """
    remarks: list[str] = []
    refuse_directory("--out", config.out, "try.json")
    _require_the_checkpoint_first(config)
    given = _given_prompts(config)
    gguf = find_gguf(config.checkpoint, progress)
    if gguf is not None:
        require_the_cpu(gguf, config.device)
    model = find_checkpoint(config, progress) if gguf is None else gguf.as_model()
    reference = find_reference(config, model, progress)
    device = torch_device("cpu" if gguf is not None else config.device)
    tokenizer = shared_tokenizer(model, reference)
    if gguf is not None:
        require_same_vocabulary(gguf, tokenizer, reference.path)
    chat = takes_chat(tokenizer, config.wants_chat, model.path)
    if not chat and config.wants_chat is None:
        remarks.append("the tokenizer has no chat template: the models go on with the prompt itself")
    runtimes = _runtimes(model, reference, gguf)
    if not _comparable(runtimes):
        remarks.append("the two are run by different engines: their speeds tell the engines apart, not the models")
    stored = reference if runtimes[1] in ("bitsandbytes", "llama.cpp") else model
    plan = TryPlan(
        config=config,
        model=model,
        reference=reference,
        gguf=gguf,
        runtimes=runtimes,
        tokenizer=tokenizer,
        chat=chat,
        context=min((one.context for one in (model, reference) if one.context is not None), default=None),
        sampling=Sampling(config.max_new_tokens, config.sampled_at, config.top_p, config.seed),
        prompts=[],
        dtype=compute_dtype(config.dtype, stored.path, device, remarks),
        device=device,
        memory_bytes=0,
        remarks=remarks,
    )
    plan = replace(plan, prompts=[plan.prepare(text) for text in given], memory_bytes=expected_memory(plan))
    require_memory(
        plan.memory_bytes,
        free_memory(device),
        hint="both models are in memory: choose --dtype bfloat16, or use a machine with more memory",
    )
    return plan


def _require_the_checkpoint_first(config: TryConfig) -> None:
    """Two arguments the wrong way round, or one word that was meant as the prompt."""
    first, prompt = config.checkpoint, config.prompt
    if first is None or os.path.exists(Path(first).expanduser()):
        return
    if prompt is not None and os.path.exists(Path(prompt).expanduser()):
        raise UsageError(f"{first!r} is no model, and the prompt {prompt!r} is a path", "name the checkpoint first")
    if prompt is None and first.isalpha() and first not in ALIASES:
        raise UsageError(
            f"no model {first!r}: no such path, alias or hub id",
            f"a prompt of one word needs the checkpoint in front of it: factorctl try CKPT {first}",
        )


def _given_prompts(config: TryConfig) -> list[str]:
    if config.prompts is not None:
        return read_prompts(config.prompts)
    return [] if config.prompt is None else [config.prompt]


def _runtimes(model: ComparedModel, reference: ComparedModel, gguf: GgufModel | None) -> tuple[Runtime, Runtime]:
    """A native checkpoint and its dense model both in factorctl's runtime; exports and their dense model in stock."""
    if gguf is not None:
        return "transformers", "llama.cpp"
    if model.native is None:
        quantised = model.manifest is not None and holds_quantised_experts(model.manifest)
        return "transformers", "bitsandbytes" if quantised else "transformers"
    factored = reference.native is not None or (reference.kind == "dense" and is_plain_dense(reference.path))
    return "factorctl" if factored else "transformers", "factorctl"


def _comparable(runtimes: tuple[Runtime, Runtime]) -> bool:
    return runtimes[0] == runtimes[1] or runtimes == ("transformers", "bitsandbytes")


def expected_memory(plan: TryPlan) -> int:
    """Bytes of both models' weights, with the logits of a continuation and what the process itself takes."""
    logits = 2 * plan.sampling.max_new_tokens * plan.reference.vocabulary * 4
    models = _weight_bytes(plan.reference, plan.dtype)
    if plan.gguf is not None:
        models += os.path.getsize(plan.gguf.file)
    elif plan.runtimes[1] == "bitsandbytes":
        models += sum(file.stat().st_size for file in plan.model.path.glob("*.safetensors"))
    else:
        models += _weight_bytes(plan.model, plan.dtype)
    return PROCESS_BYTES + models + logits


def _weight_bytes(model: ComparedModel, dtype: torch.dtype) -> int:
    return dtype.itemsize * CheckpointReader(model.path).num_values


def notation(plan: TryPlan) -> str | None:
    manifest = plan.model.manifest
    return None if manifest is None else str(manifest.factored["notation"])


def resolved_config(plan: TryPlan) -> dict[str, Any]:
    """The configuration as JSON, defaults resolved."""
    resolved = {
        "checkpoint": str(plan.model.path),
        "against": plan.reference.id,
        "chat": plan.chat,
        "raw": not plan.chat,
    }
    return {**recorded(plan.config, *EVERY_ROLE), **resolved, "temperature": plan.sampling.temperature}
