"""From a plan to what the loop trains: the model with its twin FFNs, text blocks, accelerator and optimisers."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, patch_environment
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorctl.checkpoint.reader import CheckpointReader
from factorctl.data.blocks import TokenBlocks
from factorctl.data.building import build_token_blocks
from factorctl.data.sampling import ModelSampler
from factorctl.errors import UsageError
from factorctl.ffn.choice import path_at, steps_for
from factorctl.ffn.layer import FactoredFFN
from factorctl.ffn.slicing import FactoredTensors
from factorctl.files.cache import cache_directory
from factorctl.files.hashing import hash_value
from factorctl.models.building import decoder_layers, empty_factored_model, factored_ffns
from factorctl.models.families import layer_prefix, read_dense_model
from factorctl.models.filling import stored_tensors
from factorctl.models.loading import load, load_dense
from factorctl.pipeline.common import tokenizers
from factorctl.pipeline.finetune.plan import FinetunePlan
from factorctl.progress import Progress
from factorctl.training.accelerate_settings import NEUTRAL
from factorctl.training.distiller import Distiller
from factorctl.training.optimizers import choose_trained
from factorctl.training.sharding import process_mesh, shard
from factorctl.training.teacher import dense_tensors, own_tensors, teacher_ffn
from factorctl.training.twin_ffn import TwinFFN, TwinOptions

SELF_DOCUMENT_LENGTH = 512


def load_tokenizer(plan: FinetunePlan) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, its ids held against the embeddings.

    Raises:
        UsageError: there is none that can be read, or its ids do not fit the model's embeddings.
    """
    path, config = plan.checkpoint.path, plan.checkpoint.dense.config
    hint = "factorize again from a source directory with its tokenizer files"
    tokenizer = tokenizers.load_tokenizer(path, hint=hint, config=config)
    largest = max(tokenizer.get_vocab().values(), default=0)
    vocabulary = int(config.vocab_size)
    if largest >= vocabulary:
        raise UsageError(
            f"the tokenizer in {path} does not match the model: it makes ids up to {largest}, "
            f"the model has embeddings for {vocabulary}",
            "factorize again from a source directory whose tokenizer files belong to its weights",
        )
    return tokenizer


def training_blocks(plan: FinetunePlan, progress: Progress) -> TokenBlocks:
    """The token blocks of the run, from the cache where they were made before.

    Every process calls this before they join: one builds, the others wait for its lock, with no timeout to miss.

    Raises:
        UsageError: the text is missing, unreadable, or would have to be seen too often.
    """
    tokenizer = load_tokenizer(plan)
    tokens, wanted = plan.batch.tokens, plan.config.heldout_tokens
    blocks = build_token_blocks(
        plan.data,
        tokenizer,
        block_length=plan.batch.block_length,
        tokens=tokens,
        seed=plan.config.seed,
        cache_dir=cache_directory() / "blocks",
        heldout_fraction=min(0.5, wanted / tokens),
        allow_fewer=True,
        purpose="training",
        sampler=_sampler(plan, tokenizer),
        progress=progress,
    )
    epochs = tokens / blocks.tokens
    if epochs > plan.config.max_epochs:
        raise UsageError(
            f"--tokens {tokens:,} would go {epochs:.1f} times through the text, which gives {blocks.tokens:,} tokens; "
            f"--max-epochs is {plan.config.max_epochs:g}",
            "give more text, ask for fewer tokens, or raise --max-epochs",
        )
    if epochs > 1:
        progress.note(f"the text gives {blocks.tokens:,} tokens: {tokens:,} make {epochs:.1f} epochs")
    return blocks


def _sampler(plan: FinetunePlan, tokenizer: PreTrainedTokenizerBase) -> ModelSampler:
    """Text of `self` comes from the dense model: the source, or this checkpoint with all experts on."""
    checkpoint, teacher = plan.checkpoint, plan.teacher

    def dense() -> PreTrainedModel:
        if teacher is not None:
            return load_dense(teacher.path, device=plan.device)
        return load(checkpoint.path, top_k=checkpoint.spec.shape.num_experts, device=plan.device, verify=False)

    return ModelSampler(
        load_model=dense,
        model_hash=hash_value(checkpoint.manifest.source["files"]),
        tokenizer=tokenizer,
        document_length=min(SELF_DOCUMENT_LENGTH, plan.batch.block_length),
    )


def build_distiller(plan: FinetunePlan, progress: Progress) -> Distiller:
    """Student and teacher in one model: trained values in float32, frozen ones in the compute dtype, routers float32.

    Layer by layer; where processes share the model, each keeps its part of a layer before the next one is read.
    No step draws a random number: dropout is off, also while layers are in training mode for checkpointing.
    """
    model = empty_factored_model(plan.checkpoint.dense, plan.spec).requires_grad_(False).eval()
    choose_trained(factored_ffns(model), plan.config.train, plan.recipe.weights)
    share = plan.spec.shape.top_k / plan.spec.shape.num_experts if plan.recipe.label_share == "paper" else None
    options = TwinOptions(
        plan.recipe.weights,
        share,
        plan.compute_dtype,
        router_temperature=plan.recipe.router_temperature,
        learns_sharpness=plan.recipe.sharpness_lr > 0,
        labels_from=plan.recipe.labels_from,
        straight_through=plan.config.straight_through,
        refresh_target=plan.config.refresh_target if plan.config.router_refresh else None,
    )
    mesh = process_mesh(plan.device, plan.batch.world_size) if plan.sharded else None
    reader = CheckpointReader(plan.checkpoint.path)
    names = stored_tensors(model, reader)
    _read_into(model, reader, [name for name in names if not name.startswith("model.layers.")], "", plan)
    model.tie_weights()
    _prepare_layers(plan, model)
    blocks, students, teacher_of = decoder_layers(model), list(factored_ffns(model)), _teacher_tensors(plan)
    with progress.stage("Loading the model", total=len(blocks), unit="layer") as task:
        for layer, (block, student) in enumerate(zip(blocks, students, strict=True)):
            prefix = layer_prefix(layer)
            _read_into(block, reader, [name for name in names if name.startswith(prefix)], prefix, plan)
            teacher = teacher_ffn(student, teacher_of(layer, student), plan.config.teacher_quant, plan.compute_dtype)
            block.mlp = TwinFFN(student, teacher, options)
            if mesh is not None:
                shard(block, mesh)
            task.advance()
    distiller = Distiller(model, options, plan.recipe.temperature)
    if mesh is not None:
        shard(distiller, mesh)
    return distiller


def _read_into(module: nn.Module, reader: CheckpointReader, names: list[str], prefix: str, plan: FinetunePlan) -> None:
    """Fill a part of an empty model that a checkpoint knows as `prefix`, each tensor in the dtype of its role."""
    trained = {prefix + name for name, parameter in module.named_parameters() if parameter.requires_grad}
    state = {}
    for name in names:
        tensor = reader.read(name)
        if tensor.is_floating_point():
            keeps_precision = name in trained or name.endswith(".router")
            tensor = tensor.to(torch.float32 if keeps_precision else plan.compute_dtype)
        state[name.removeprefix(prefix)] = tensor.to(plan.device)
    module.load_state_dict(state, strict=False, assign=True)  # `stored_tensors` has checked the names


def _prepare_layers(plan: FinetunePlan, model: PreTrainedModel) -> None:
    """What is decided before there are weights: buffers, dropout, what is computed twice, what is compiled."""
    model.config.dtype, model.config.use_cache = plan.compute_dtype, False
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:  # rotary frequencies: no checkpoint holds them
                setattr(module, name, buffer.to(plan.device))
    _switch_off_dropout(model)
    if plan.config.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.train()
    if plan.config.compile:
        _compile(plan, model)


def _compile(plan: FinetunePlan, model: PreTrainedModel) -> None:
    """Compile layer by layer: they share one graph. The path is looked up before, which a graph cannot do."""
    tokens = plan.batch.micro_batch * plan.batch.block_length
    for student in factored_ffns(model):
        if student.routes:
            steps = steps_for(plan.device, plan.compute_dtype, student.hidden_size, student.sizes, False, True)
            student.path = path_at(steps, tokens)
    for block in decoder_layers(model):
        block.compile()


def _teacher_tensors(plan: FinetunePlan) -> Callable[[int, FactoredFFN], FactoredTensors]:
    """From a layer and its student to the dense values, the source's headers read once."""
    if plan.teacher is None:
        return lambda _, student: own_tensors(student)
    dense, reader = read_dense_model(plan.teacher.path), CheckpointReader(plan.teacher.path)
    return lambda layer, student: dense_tensors(student, dense.read_ffn(layer, reader.read))


def _switch_off_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def make_accelerator(plan: FinetunePlan) -> Accelerator:
    """accelerate's view of this process: alone, or one of several that a launcher started.

    Precision and sharding are not accelerate's business here: `TwinFFN` and `Distiller` choose dtypes part by part, and
    `build_distiller` shards. Neither are rounds of a step and compiling.

    Raises:
        UsageError: a tracker is not installed.
    """
    for tracker in plan.config.track:
        if importlib.util.find_spec(tracker) is None:
            raise UsageError(f"--track {tracker}: {tracker} is not installed", f"pip install {tracker}")
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    _let_go_of_another_device(plan.device)
    with patch_environment(**NEUTRAL):
        return Accelerator(
            cpu=plan.device.type == "cpu",
            mixed_precision="no",
            log_with=list(plan.config.track) or None,
            project_dir=str(plan.run),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )


def _let_go_of_another_device(device: torch.device) -> None:
    """Forget that of an earlier run, unless processes were joined on it: accelerate keeps one per Python process."""
    if not PartialState._shared_state:
        return
    earlier = PartialState()
    if earlier.distributed_type == DistributedType.NO and earlier.device.type != device.type:
        AcceleratorState._reset_state(reset_partial_state=True)


def start_trackers(plan: FinetunePlan, accelerator: Accelerator) -> None:
    if plan.config.track:
        facts: dict[str, Any] = {"preset": plan.config.preset, "notation": plan.spec.shape.notation}
        accelerator.init_trackers("factorctl", config={**facts, "tokens": plan.batch.tokens})
