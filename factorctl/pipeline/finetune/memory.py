"""How much memory a finetune takes, before it takes it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from factorctl.checkpoint.reader import CheckpointReader
from factorctl.files.publishing import require_disk_space
from factorctl.memory import PROCESS_BYTES, free_memory, require_memory
from factorctl.models.building import decoder_layers, factored_ffns
from factorctl.training.head_losses import chunk_tokens
from factorctl.training.optimizers import is_router
from factorctl.training.presets import TrainingRecipe

if TYPE_CHECKING:
    from factorctl.pipeline.finetune.plan import FinetunePlan


def expected_memory(plan: FinetunePlan, model: PreTrainedModel) -> dict[str, int]:
    """Bytes per process, from shapes; `model` is on the meta device and knows what is trained."""
    width = plan.compute_dtype.itemsize
    trained = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    values = sum(count for _, count in trained)
    experts = sum(count for name, count in trained if not is_router(name))
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    vocabulary = int(plan.checkpoint.dense.config.vocab_size)
    tokens = plan.batch.micro_batch * plan.batch.block_length
    kept_layers = 2 if plan.config.gradient_checkpointing else plan.checkpoint.dense.num_layers
    kept_casts = experts * kept_layers // plan.checkpoint.dense.num_layers
    held = {
        "frozen weights": frozen * width,
        "trained weights": values * 4,
        "gradients": values * 4,
        "optimizer": values * _state_width(plan.recipe),
        "teacher": _teacher_bytes(plan, model, experts),
        "router moments": _moment_bytes(plan) if plan.config.router_refresh else 0,
    }
    if plan.sharded:
        held = _per_process(plan, model, held)
    return {
        "process": PROCESS_BYTES,
        **held,
        "half-precision copies": kept_casts * width if plan.compute_dtype != torch.float32 else 0,
        "activations": tokens * kept_layers * _kept_per_token(plan),
        "logits": 6 * min(tokens, chunk_tokens(plan.device, vocabulary)) * vocabulary * 4,
    }


def _teacher_bytes(plan: FinetunePlan, model: PreTrainedModel, experts: int) -> int:
    """What the teacher holds beside the student: copies of trained values, or all of its FFNs."""
    quant = plan.config.teacher_quant
    width = {"none": plan.compute_dtype.itemsize, "bf16": 2, "8bit": 1, "4bit": 0.5}[quant]
    own = plan.teacher is None and quant == "none"
    copied = experts if own else sum(p.numel() for ffn in factored_ffns(model) for p in ffn.parameters())
    return int(copied * width)


def _state_width(recipe: TrainingRecipe) -> int:
    """Bytes that the optimiser keeps per trained value: two moments, two in 8 bits, or Muon's one."""
    return {"adamw-8bit": 2, "muon": 4}.get(recipe.optimizer, 8)


def _moment_bytes(plan: FinetunePlan) -> int:
    """What layers collect for a refresh of routers: their inputs times each other and a value per expert, float32."""
    dense = plan.checkpoint.dense
    return dense.num_layers * dense.hidden_size * (dense.hidden_size + plan.spec.shape.num_experts) * 4


def _per_process(plan: FinetunePlan, model: PreTrainedModel, held: dict[str, int]) -> dict[str, int]:
    """`held` spread over the processes, and what one of them has whole at a time: the layer that runs, the next one on
    its way, the gradients of one, and embeddings and head. Quantised teachers are not spread."""
    layers = decoder_layers(model)
    everything = held["frozen weights"] + held["trained weights"] + held["teacher"]
    outside = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in layers.parameters())
    outside *= plan.compute_dtype.itemsize
    per_layer = (2 * (everything - outside) + held["gradients"]) // len(layers)
    quantised = plan.config.teacher_quant in ("8bit", "4bit")
    spread = {
        name: size if name == "teacher" and quantised else math.ceil(size / plan.batch.world_size)
        for name, size in held.items()
    }
    return spread | {"put together": outside + per_layer}


def _kept_per_token(plan: FinetunePlan) -> int:
    """Bytes per token that a decoder layer keeps for its backward pass: norms (float32), attention, then the FFN with
    K copies of its input and what each active neuron computes."""
    hidden, shape = plan.checkpoint.dense.hidden_size, plan.spec.shape
    computed = 12 * hidden + 2 * shape.top_k * hidden + 6 * shape.active_neurons
    return 4 * 4 * hidden + computed * plan.compute_dtype.itemsize


def require_resources(plan: FinetunePlan) -> None:
    """Refuse before the work starts what disk or memory cannot hold."""
    reader = CheckpointReader(plan.checkpoint.path)
    result = sum(entry.nbytes for entry in reader.entries.values())
    state = plan.trained_parameters * (4 + _state_width(plan.recipe)) + plan.memory["router moments"]
    require_disk_space(plan.out.parent, result + 2 * state)
    sharing = 1 if plan.device.type == "cuda" else plan.batch.world_size  # processes have a GPU each, and one machine
    hint = (
        "lower --micro-batch or --block-length, or choose --gradient-checkpointing, --optimizer adamw-8bit, "
        "--precision bfloat16"
    )
    require_memory(plan.memory_bytes, free_memory(plan.device) // sharing, hint=hint)
