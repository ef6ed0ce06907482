"""What `frontier` decides before it loads a weight: the splits, their order, what is measured, memory and time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from factorctl.checkpoint.reader import CheckpointReader
from factorctl.checkpoint.sources import Source
from factorctl.config.factorize import FactorizeConfig
from factorctl.config.frontier import FrontierConfig
from factorctl.config.shape import FactorShape
from factorctl.contracts import Stat, chooses_shared
from factorctl.data.spec import parse_data_spec
from factorctl.errors import UsageError
from factorctl.ffn.spec import FactoredSpec
from factorctl.memory import available_memory, require_memory
from factorctl.models.families import DenseModel
from factorctl.pipeline.common.devices import compute_dtype, torch_device
from factorctl.pipeline.common.workspace import report_directory
from factorctl.pipeline.factorize.plan import FactorizePlan, plan_factorize
from factorctl.pipeline.frontier.splits import coarse_to_fine, families
from factorctl.profiling.latency import Effort, Regime
from factorctl.progress import Progress

WINDOW = 1024
DECODE_TOKENS = 8


@dataclass(frozen=True)
class FrontierPlan:
    """Everything that is decided before the first weight is read."""

    config: FrontierConfig
    out: Path
    base: FactorizePlan
    """One split of the search as `factorize` plans it: source, strategy, storage and all else that splits share."""
    families: tuple[FactorShape, ...]
    """One shape per partition."""
    grid: tuple[FactorShape, ...]
    """All splits in the order in which they are tried."""
    device: torch.device
    dtype: torch.dtype
    """In which quality and speed are measured."""
    window: int
    memory_bytes: int
    remarks: tuple[str, ...]

    @property
    def source(self) -> Source:
        return self.base.source

    @property
    def dense(self) -> DenseModel:
        return self.base.dense

    @property
    def layers(self) -> int:
        return self.dense.num_layers

    @property
    def third(self) -> int:
        """Layers behind which a split is judged hopeless or not."""
        return max(1, self.layers // 3)

    @property
    def regime(self) -> Regime:
        return Regime(self.config.batch, self.config.prompt)

    def effort(self, rounds: int) -> Effort:
        return Effort(rounds, DECODE_TOKENS, seconds=60.0)

    @property
    def needs(self) -> frozenset[Stat]:
        """The statistics that partitions are made from, whichever family they are of."""
        importance = any(shape.shared_size for shape in self.families) and not chooses_shared(self.base.strategy)
        return self.base.needs | ({Stat.IMPORTANCE} if importance else frozenset())

    @property
    def reader(self) -> CheckpointReader:
        return self.base.reader

    def factorize_config(self, shape: FactorShape) -> FactorizeConfig:
        """`factorize` with this split and all else as the search has it."""
        return split_config(self.base.config, shape)

    def spec(self, shape: FactorShape) -> FactoredSpec:
        """Without scales, which are fitted layer by layer."""
        return FactoredSpec(shape, self.base.config.gate, self.factorize_config(shape).split.scale)

    def expected_seconds(self) -> float:
        """About how long the splits of the grid take, each as long as the one that `factorize` plans."""
        once = self.base.expected_seconds()
        per_split = once["running the model"] + once["fitting"]
        shared = once["running the model"] + len(self.families) * once["partitioning"] + once.get("sampling text", 0.0)
        return shared + len(self.grid) * per_split


def split_config(base: FactorizeConfig, shape: FactorShape) -> FactorizeConfig:
    """`base` with another split; where nothing is routed, nothing is fitted for routing."""
    split = replace(
        base,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        shared_fraction=shape.shared_size / shape.intermediate_size,
    )
    return split if shape.routes else replace(split, strategy="contiguous", router="random", scale="sum")


def plan_frontier(config: FrontierConfig, progress: Progress) -> FrontierPlan:
    """Resolve and check all that can be checked without reading weights.

    Raises:
        UsageError: an option does not fit the model or the output.
        ResourceError: disk, memory or device do not suffice.
    """
    out = report_directory(config.out, config.workspace, config.model, "frontier")
    if config.data is not None and parse_data_spec(config.data, text_field=config.text_field).uses_self:
        raise UsageError(
            "--data self is no held-out text: it would measure the model on what it writes itself",
            "give text that the model did not write, or leave --data out",
        )
    base = plan_factorize(
        FactorizeConfig(
            model=config.model,
            num_experts=config.experts[0],
            shared_fraction=config.shared_fraction[0],
            strategy=config.strategy,
            scale="fitted",
            refit=config.refit,
            calibration=config.calibration,
            calibration_tokens=config.calibration_tokens,
            text_field=config.text_field,
            revision=config.revision,
            seed=config.seed,
            device=config.device,
            dtype=config.dtype,
            out=out / "checkpoint",
        ),
        progress,
    )
    found = families(config, base.dense.intermediate_size)
    device = torch_device(config.device)
    remarks: list[str] = []
    dtype = compute_dtype(config.dtype, base.source.path, device, remarks)
    context = WINDOW if base.dense.context is None else base.dense.context
    if config.prompt + DECODE_TOKENS > context:
        raise UsageError(
            f"--prompt {config.prompt} and {DECODE_TOKENS} tokens of decoding are more than the model's context",
            f"choose at most {context - DECODE_TOKENS}",
        )
    memory = base.memory_bytes + 2 * base.reader.num_values * dtype.itemsize
    require_memory(memory, available_memory(), hint="lower --calibration-tokens, or choose --dtype bfloat16")
    return FrontierPlan(
        config=config,
        out=out,
        base=base,
        families=tuple(found),
        grid=tuple(coarse_to_fine(found)),
        device=device,
        dtype=dtype,
        window=min(WINDOW, context),
        memory_bytes=memory,
        remarks=tuple(remarks),
    )
