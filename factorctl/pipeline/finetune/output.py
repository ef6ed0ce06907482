"""What a finished run leaves: the trained checkpoint with its manifest, and the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from factorctl import __version__
from factorctl.checkpoint.builder import building
from factorctl.checkpoint.manifest import Manifest
from factorctl.checkpoint.reader import CheckpointReader
from factorctl.checkpoint.sources import copied_files
from factorctl.data.blocks import TokenBlocks
from factorctl.files.hashing import hash_value
from factorctl.files.strict_json import dump_json
from factorctl.models.families import layer_prefix
from factorctl.models.loading import native_config
from factorctl.pipeline.common.devices import storage_dtype
from factorctl.pipeline.common.model_card import native_card
from factorctl.pipeline.common.provenance import library_versions
from factorctl.pipeline.finetune.domains import domain_tensors
from factorctl.pipeline.finetune.plan import FinetunePlan, resolved_config
from factorctl.progress import Progress
from factorctl.training.distiller import Distiller
from factorctl.training.heldout import Heldout
from factorctl.training.sharding import all_gathered
from factorctl.training.twin_ffn import TwinFFN


def publish_checkpoint(
    plan: FinetunePlan, trained: Mapping[str, torch.Tensor], manifest: Manifest, progress: Progress
) -> Manifest:
    """Write the checkpoint: trained tensors from the model, all others byte for byte from the parent."""
    reader, dense = CheckpointReader(plan.checkpoint.path), plan.checkpoint.dense
    fingerprint = hash_value({"manifest": manifest.to_bytes().decode(), "run": plan.run.name})
    num_shards = dense.num_layers + 1
    names = [*reader.entries, *sorted(trained.keys() - reader.entries.keys())]
    with building(
        plan.out, num_shards=num_shards, fingerprint=fingerprint, overwrite=plan.config.overwrite, progress=progress
    ) as builder:
        for index, held in enumerate(_shards(names, dense.num_layers)):
            if builder.finished(index) is None:
                builder.write_shard(index, {name: _stored(plan, reader, trained, name) for name in held}, {})
        builder.write_file("config.json", dump_json(native_config(dense, plan.spec)))
        for path in copied_files(plan.checkpoint.path):
            builder.copy_file(path)
        builder.write_file("README.md", native_card(manifest, dense.raw).encode())
        return builder.publish(manifest)


def _shards(names: Sequence[str], num_layers: int) -> list[list[str]]:
    """Tensor names by shard: embeddings, norm and head first, then layer by layer, as `factorize` writes them."""
    rest = [name for name in names if not name.startswith("model.layers.")]
    layers = [[name for name in names if name.startswith(layer_prefix(layer))] for layer in range(num_layers)]
    return [rest, *layers]


def _stored(
    plan: FinetunePlan, reader: CheckpointReader, trained: Mapping[str, torch.Tensor], name: str
) -> torch.Tensor:
    stored = reader.entry(name).dtype if name in reader.entries else reader.matrix_dtype
    dtype = storage_dtype(plan.config.dtype, stored)
    tensor = trained[name] if name in trained else reader.read(name)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def trained_tensors(distiller: Distiller, *, keeps: bool) -> dict[str, torch.Tensor]:
    """The trained values on the CPU, by the names and at the scale that they have in a checkpoint.

    All processes must call this; the one that will write `keeps` them.
    """
    tensors = domain_tensors(distiller.model) if keeps else {}
    for name, parameter in distiller.named_parameters():
        module, _, own = name.partition(".student.")
        if parameter.requires_grad and own:
            twin = distiller.get_submodule(module)
            assert isinstance(twin, TwinFFN)
            value = all_gathered(parameter.detach())
            if own == "router":
                value = value / all_gathered(twin.reach.detach()) * all_gathered(twin.sharpness.detach())
            if keeps:
                tensors[f"{module.removeprefix('model.')}.{own}"] = value.cpu()
    return tensors


def finetuned_manifest(plan: FinetunePlan, blocks: TokenBlocks, before: Heldout, after: Heldout) -> Manifest:
    """The account of the run, without its files yet. No timings: the same run gives the same bytes."""
    parent, base = plan.checkpoint.manifest, plan.checkpoint.spec.shape
    shape = plan.spec.shape
    training: dict[str, Any] = {
        "preset": plan.config.preset,
        "tokens": plan.batch.tokens,
        "steps": plan.batch.steps,
        "batch_tokens": plan.batch.batch_tokens,
        "world_size": plan.batch.world_size,
        "epochs": plan.batch.tokens / blocks.tokens,
        "trained_parameters": plan.trained_parameters,
        "retargeted_from_top_k": base.top_k if base.top_k != shape.top_k else None,
        "teacher": "the parent's own values, all experts on" if plan.teacher is None else plan.teacher.id,
        "data": blocks.record,
        "heldout_tokens": int(blocks.heldout.size),
        "perplexity_dense": before.perplexity_dense,
        "perplexity_before": before.perplexity,
        "perplexity_after": after.perplexity,
        "router_agreement_before": before.agreement,
        "router_agreement": after.agreement,
        "losses_before": before.losses,
        "losses": after.losses,
    }
    layers = parent.details.get("layers") or []
    return Manifest(
        kind="native",
        stage="finetune",
        tool_version=__version__,
        source=parent.source,
        factored=plan.spec.summary(),
        parent=parent.sha256,
        config=resolved_config(plan),
        details={
            "strategy": parent.details.get("strategy"),
            "layers": [{k: v for k, v in layer.items() if k == "permutation_sha256"} for layer in layers],
            "training": training,
        },
        libraries=library_versions(),
    )
