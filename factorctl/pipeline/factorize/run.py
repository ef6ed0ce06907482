"""`factorize`: a dense checkpoint in, a native factored checkpoint out."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from factorctl import __version__
from factorctl.calibration.compressed_stream import CalibrationStream
from factorctl.calibration.stream import LayerwiseModel
from factorctl.checkpoint.builder import ArtefactBuilder, building
from factorctl.checkpoint.manifest import Manifest
from factorctl.checkpoint.reader import COMPUTED, CheckpointReader, all_finite
from factorctl.checkpoint.sources import copied_files
from factorctl.config.factorize import FactorizeConfig
from factorctl.config.option import recorded
from factorctl.data.blocks import TokenBlocks
from factorctl.errors import UsageError
from factorctl.ffn.labels import dead_experts
from factorctl.ffn.spec import FactoredSpec
from factorctl.files.hashing import hash_value
from factorctl.files.strict_json import dump_json
from factorctl.memory import peak_memory
from factorctl.models.building import empty_dense_model
from factorctl.models.families import ffn_prefix, layer_prefix
from factorctl.models.filling import stored_tensors
from factorctl.models.loading import native_config, read_factored_ffn
from factorctl.pipeline.common.calibration import calibration_blocks
from factorctl.pipeline.common.devices import torch_device
from factorctl.pipeline.common.layer_records import recorded_load
from factorctl.pipeline.common.model_card import native_card
from factorctl.pipeline.common.provenance import library_versions
from factorctl.pipeline.common.recorded_source import describe_source
from factorctl.pipeline.factorize.layers import FactoredLayer, LayerFactory
from factorctl.pipeline.factorize.plan import FactorizePlan, plan_factorize, stored_dtype
from factorctl.progress import Progress


@dataclass(frozen=True)
class FactorizeResult:
    """What was made; the keys of `--format json`."""

    checkpoint: str
    source: str
    notation: str
    num_experts: int
    top_k: int
    shared_size: int
    expert_size: int
    strategy: str
    active_ffn_fraction: float
    identity_error: float
    num_layers: int
    seconds: float
    peak_rss_bytes: int
    refit_layers_kept: int | None
    idle_experts: int | None
    """Experts that hardly any calibration token chose; None where no router was fitted."""
    layers: list[dict[str, Any]]


def factorize(config: FactorizeConfig, progress: Progress) -> FactorizeResult:
    """Factor every FFN of a dense checkpoint and publish the result.

    1. Resolve the source and check every option against it.
    2. Read the calibration text, if an option needs it.
    3. Write the tensors outside of the layers.
    4. Layer by layer: partition, slice, prove the identity, fit router, scale and down-projection; write the shard.
    5. Write config, tokenizer, card; then the manifest; then give the directory its name.

    Raises:
        FactorctlError: with what is wrong; nothing is published then.
    """
    started = time.monotonic()
    plan = plan_factorize(config, progress)
    device = torch_device(config.device)
    with progress.stage("Hashing the source"):
        source = describe_source(plan.source)
    blocks = calibration_blocks(plan.source, plan.dense, source, plan.config, progress) if plan.calibrates else None
    identity = _fingerprint(plan, source, blocks)
    num_shards = plan.dense.num_layers + 1
    with building(
        plan.out, num_shards=num_shards, fingerprint=identity, overwrite=config.overwrite, progress=progress
    ) as builder:
        _write_rest(plan, builder)  # first: a value that does not fit is found before the long part
        records = _write_layers(plan, builder, blocks, device, progress)
        spec = plan.spec
        if spec.scale == "fitted":
            spec = replace(spec, fitted_a=tuple(record["fitted_a"] for record in records))
        manifest = _manifest(plan, spec, source, blocks, records)
        builder.write_file("config.json", dump_json(native_config(plan.dense, spec)))
        for path in copied_files(plan.source.path):
            if path.name not in plan.tokenizer.superseded:
                builder.copy_file(path)
        for name, content in plan.tokenizer.files.items():
            builder.write_file(name, content)
        builder.write_file("README.md", native_card(manifest, plan.dense.raw).encode())
        builder.publish(manifest)
    shape = plan.spec.shape
    refits = [record["refit"]["kept"] for record in records if "refit" in record]
    load_LN = recorded_load(records)
    return FactorizeResult(
        checkpoint=str(plan.out),
        source=plan.source.id,
        notation=shape.notation,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        shared_size=shape.shared_size,
        expert_size=shape.expert_size,
        strategy=plan.provenance.name,
        active_ffn_fraction=shape.active_ffn_fraction,
        identity_error=max(record["identity_error"] for record in records),
        num_layers=plan.dense.num_layers,
        seconds=round(time.monotonic() - started, 3),
        peak_rss_bytes=peak_memory(),
        refit_layers_kept=sum(refits) if refits else None,
        idle_experts=len(dead_experts(load_LN, shape.top_k)) if load_LN else None,
        layers=records,
    )


def _fingerprint(plan: FactorizePlan, source: dict[str, Any], blocks: TokenBlocks | None) -> str:
    """Names the work: whatever could change a byte of the result."""
    return hash_value(
        {
            "config": recorded(plan.config),
            "source": source["files"],
            "strategy": asdict(plan.provenance),
            "calibration": None if blocks is None else blocks.fingerprint,
            "libraries": library_versions(),
            "tool_version": __version__,
        }
    )


def _write_layers(
    plan: FactorizePlan,
    builder: ArtefactBuilder,
    blocks: TokenBlocks | None,
    device: torch.device,
    progress: Progress,
) -> list[dict[str, Any]]:
    reader = plan.reader
    factory = LayerFactory.of(plan.config, plan.dense, plan.spec, plan.strategy, reader, plan.needs)
    layers = range(plan.dense.num_layers)
    if blocks is not None and any(builder.finished(layer + 1) is None for layer in layers):
        ids_BL = torch.from_numpy(blocks.train.astype("int64"))
        factory.stream = CalibrationStream(LayerwiseModel(plan.dense, reader, ids_BL, device), plan.compressed)
    records = []
    with progress.stage("Factorizing", total=len(layers), unit="layer") as task:
        for layer in layers:
            record = builder.finished(layer + 1)
            if record is None:
                factored = factory.factor(layer)
                record = factored.record
                builder.write_shard(layer + 1, _layer_tensors(plan, reader, layer, factored), record)
            elif factory.stream is not None:
                written = CheckpointReader.of_file(builder.shard_path(layer + 1))
                factory.replay(layer, read_factored_ffn(written, layer), record)
            records.append(record)
            task.advance(layer=layer)
    return records


def _layer_tensors(
    plan: FactorizePlan, reader: CheckpointReader, layer: int, factored: FactoredLayer
) -> dict[str, torch.Tensor]:
    """All tensors of a decoder layer: the factored FFN's and everything else as it was."""
    replaced = set(plan.dense.ffn_tensor_names(layer).values())
    kept = [name for name in reader.entries if name.startswith(layer_prefix(layer)) and name not in replaced]
    tensors = {name: _stored(plan, reader, name) for name in kept if not name.endswith(COMPUTED)}
    return tensors | {f"{ffn_prefix(layer)}.{name}": tensor for name, tensor in factored.tensors.items()}


def _write_rest(plan: FactorizePlan, builder: ArtefactBuilder) -> None:
    """Shard 0: embeddings, final norm, head."""
    if builder.finished(0) is not None:
        return
    reader = plan.reader
    names = [n for n in stored_tensors(empty_dense_model(plan.dense), reader) if not n.startswith("model.layers.")]
    builder.write_shard(0, {name: _stored(plan, reader, name) for name in names}, {})


def _stored(plan: FactorizePlan, reader: CheckpointReader, name: str) -> torch.Tensor:
    tensor = reader.read(name)
    stored = tensor.to(stored_dtype(plan.config, reader.entry(name)))
    if not all_finite(stored):
        raise UsageError(
            f"tensor {name} has values beyond the range of {plan.config.dtype}", "choose --dtype bfloat16 or auto"
        )
    return stored


def _manifest(
    plan: FactorizePlan,
    spec: FactoredSpec,
    source: dict[str, Any],
    blocks: TokenBlocks | None,
    records: list[dict[str, Any]],
) -> Manifest:
    return Manifest(
        kind="native",
        stage="factorize",
        tool_version=__version__,
        source={**source, "model_type": plan.dense.family.model_type},
        factored=spec.summary(),
        config=recorded(plan.config),
        details={
            "strategy": {**asdict(plan.provenance), "options": dict(plan.config.strategy_options)},
            "identity_error": max(record["identity_error"] for record in records),
            "calibration": None if blocks is None else blocks.record,
            "layers": records,
        },
        libraries=library_versions(),
    )
