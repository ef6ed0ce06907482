"""What `factorize` decides before it loads a weight: sizes, strategy, what is calibrated, memory, disk and time."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

import torch

from factorctl.calibration.tokens import CHUNK_TOKENS, HIDDEN_BYTES
from factorctl.checkpoint.reader import CheckpointReader, TensorEntry
from factorctl.checkpoint.sources import Source
from factorctl.config.common import DTypeName
from factorctl.config.factorize import FactorizeConfig
from factorctl.contracts import SAMPLE_TOKENS, PartitionStrategy, Stat, check_option_names, chooses_shared
from factorctl.data.sampling import ModelSampler
from factorctl.data.spec import parse_data_spec
from factorctl.errors import IntegrityError, UsageError
from factorctl.ffn.spec import FactoredSpec
from factorctl.files.publishing import refuse_existing, require_disk_space
from factorctl.memory import PROCESS_BYTES, available_memory, free_memory, require_memory
from factorctl.models.building import empty_dense_model
from factorctl.models.families import DenseModel, read_dense_model
from factorctl.models.filling import stored_tensors
from factorctl.partitions import StrategyProvenance, get_strategy
from factorctl.pipeline.common.calibration import calibration_block_length
from factorctl.pipeline.common.dense_source import find_source
from factorctl.pipeline.common.devices import storage_dtype, torch_device
from factorctl.pipeline.common.source_tokenizer import WITHOUT_CALIBRATION, SourceTokenizer, source_tokenizer
from factorctl.pipeline.common.time_estimate import DenseSize, Sampling, factorize_seconds, measured_rates
from factorctl.pipeline.common.workspace import output_path
from factorctl.progress import Progress


@dataclass(frozen=True)
class FactorizePlan:
    """Everything that is decided before the first weight is read."""

    config: FactorizeConfig
    out: Path
    source: Source
    dense: DenseModel
    spec: FactoredSpec
    strategy: PartitionStrategy
    provenance: StrategyProvenance
    needs: frozenset[Stat]
    calibrates: bool
    tokenizer: SourceTokenizer
    compressed: bool
    reader: CheckpointReader
    """Of the source: its headers are read once."""

    @property
    def disk_bytes(self) -> int:
        entries = self.reader.entries.values()
        return sum(math.prod(entry.shape) * stored_dtype(self.config, entry).itemsize for entry in entries)

    @property
    def memory_bytes(self) -> int:
        """Peak of the run's resident memory."""
        tokens = self.config.calibrated_on if self.calibrates else 0
        return self._peak_bytes(tokens, refit=self.config.refit)

    @property
    def least_memory_bytes(self) -> int:
        """The same where nothing is calibrated."""
        return self._peak_bytes(0, refit=False)

    def _peak_bytes(self, calibration_tokens: int, *, refit: bool) -> int:
        shards: Counter[str] = Counter()
        for name, entry in self.reader.entries.items():
            shards[shard_of(name)] += entry.nbytes
        return peak_bytes(
            self.dense,
            max(shards.values()),
            calibration_tokens=calibration_tokens,
            hands_out_tokens=Stat.TOKENS in self.needs,
            refit=refit,
        )

    def expected_seconds(self) -> dict[str, float]:
        """About how long each part of the run will take; measures this machine for half a second."""
        dense = DenseSize(
            self.dense.hidden_size,
            self.dense.num_layers,
            vocabulary=int(self.dense.config.vocab_size),
            parameters=self.reader.num_values,
            source_bytes=sum(entry.nbytes for entry in self.reader.entries.values()),
        )
        sampling = Sampling(calibration_block_length(self.dense), ModelSampler.batch_size)
        return factorize_seconds(
            self.config,
            self.spec.shape,
            dense,
            sampling if parse_data_spec(self.config.calibration, option="--calibration").uses_self else None,
            measured_rates(torch_device(self.config.device), sampling, dense.vocabulary),
            calibrates=self.calibrates,
            compressed=self.compressed,
        )


def plan_factorize(config: FactorizeConfig, progress: Progress) -> FactorizePlan:
    """Resolve and check all that can be checked without reading weights.

    Raises:
        UsageError: an option does not fit the model, the strategy or the output.
        ResourceError: disk or memory, the GPU's included, do not suffice; or there is no GPU where one was asked for.
    """
    config = config.resolved(torch_device(config.device).type)
    assert config.strategy is not None, "resolved"
    strategy, provenance = get_strategy(config.strategy)
    check_option_names(strategy, config.strategy_options)
    needs = strategy.needs(config.strategy_options)
    source = find_source(config.model, progress, revision=config.revision)
    for note in source.notes:
        progress.note(note)
    dense = read_dense_model(source.path)
    shape = config.shape_for(dense.intermediate_size)
    out = output_path(config.out, config.workspace, config.model, shape.notation)
    refuse_existing(out, overwrite=config.overwrite)
    if shape.shared_size and not chooses_shared(strategy):
        needs = needs | {Stat.IMPORTANCE}
    compressed = config.router == "analytic" or config.split.scale == "fitted" or config.refit
    reader = CheckpointReader(source.path)
    stored_tensors(empty_dense_model(dense), reader)
    refuse_other_copy_of_tied(dense, reader)
    config = _with_one_dtype(config, reader, progress)
    calibrates = compressed or bool(needs)
    if calibrates:
        parse_data_spec(config.calibration, text_field=config.text_field, option="--calibration")
    tokenizer = source_tokenizer(source.path, dense, needed=calibrates, progress=progress)
    plan = FactorizePlan(
        config=config,
        out=out,
        source=source,
        dense=dense,
        spec=FactoredSpec(shape, config.gate, config.split.scale),
        strategy=strategy,
        provenance=provenance,
        needs=needs,
        calibrates=calibrates,
        tokenizer=tokenizer,
        compressed=compressed,
        reader=reader,
    )
    require_resources(plan)
    return plan


def shard_of(name: str) -> str:
    """What is held at once: a decoder layer, or everything outside of them."""
    return ".".join(name.split(".")[:3]) if name.startswith("model.layers.") else "rest"


def peak_bytes(
    dense: DenseModel, largest_shard: int, *, calibration_tokens: int, hands_out_tokens: bool, refit: bool
) -> int:
    """The process, the largest shard in three forms, and the calibration stream.

    A layer is held as read, as factored and as the bytes to be written; its FFN once more in float32 for the check.
    A strategy that is handed tokens makes as much of their activations again.
    """
    ffn_float32 = 3 * dense.intermediate_size * dense.hidden_size * 4
    total = PROCESS_BYTES + 3 * largest_shard + 2 * ffn_float32
    if calibration_tokens:
        total += 6 * calibration_tokens * dense.hidden_size * 4 + 2 * ffn_float32
        total += 4 * CHUNK_TOKENS * dense.intermediate_size * 4
        total += min(HIDDEN_BYTES, calibration_tokens * dense.intermediate_size * 4)
    if hands_out_tokens:
        total += 2 * min(SAMPLE_TOKENS, calibration_tokens) * dense.intermediate_size * 4
    if refit:
        total += 4 * dense.intermediate_size**2 * 8
    return total


def require_resources(plan: FactorizePlan) -> None:
    """Refuse before the work starts what disk or memory cannot hold."""
    require_disk_space(plan.out.parent, plan.disk_bytes)
    device = torch_device(plan.config.device)
    if device.type == "cuda":
        calibrating = plan.memory_bytes - plan.least_memory_bytes
        hint = f"lower --calibration-tokens, or choose --device cpu, or {WITHOUT_CALIBRATION}"
        require_memory(calibrating, free_memory(device), hint=hint, purpose=" on the GPU")
    available = available_memory()
    if plan.least_memory_bytes > available:
        hint = "free some memory, or take a machine that has more: the largest layer alone does not fit"
    else:
        hint = f"lower --calibration-tokens, or {WITHOUT_CALIBRATION}"
    require_memory(plan.memory_bytes, available, hint=hint)


def refuse_other_copy_of_tied(dense: DenseModel, reader: CheckpointReader) -> None:
    """Old writers stored tied embeddings twice; a copy that differs is another head.

    Raises:
        IntegrityError: the two differ.
    """
    if not dense.config.tie_word_embeddings or "lm_head.weight" not in reader.entries:
        return
    if not torch.equal(reader.read("lm_head.weight"), reader.read("model.embed_tokens.weight")):
        raise IntegrityError(
            f"{reader.directory}: the config ties lm_head.weight to the embeddings, but the two differ",
            "set tie_word_embeddings to false in its config.json if the separate head is meant",
        )


def _with_one_dtype(config: FactorizeConfig, reader: CheckpointReader, progress: Progress) -> FactorizeConfig:
    """`auto` as a name where the matrices of the source differ: the dtype that holds all of them exactly."""
    found = {e.dtype for e in reader.entries.values() if e.dtype.is_floating_point and len(e.shape) > 1}
    name = str(reader.matrix_dtype).removeprefix("torch.")
    if config.dtype != "auto" or len(found) < 2 or name not in get_args(DTypeName):
        return config
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
    progress.note(f"the source's weights are stored in {names}: all are kept in {name}, exactly; --dtype takes another")
    return replace(config, dtype=cast(DTypeName, name))


def stored_dtype(config: FactorizeConfig, entry: TensorEntry) -> torch.dtype:
    """The dtype in which a tensor of the source is stored.

    Raises:
        UsageError: the source holds integers, which only a quantised model's weights are.
    """
    if not entry.dtype.is_floating_point:
        raise UsageError(
            f"tensor {entry.name} in {entry.file} is stored as {str(entry.dtype).removeprefix('torch.')}: "
            "quantised weights cannot be cut into experts",
            "give the unquantised checkpoint",
        )
    return storage_dtype(config.dtype, entry.dtype)
