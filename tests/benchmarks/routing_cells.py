"""The cells of the routing benchmark: which split, made how, trained on how many tokens with which options.

A plan is a TOML file of `[[cells]]`; plans/ holds some. Every list in it is an axis: all combinations are cells, the
last axis changing fastest.

    [[cells]]
    split = ["50-96", "25-84"]
    method = ["routed", "static"]
    tokens = 61440
    text = "select"
    finetune.lr = [1e-4, 2e-4, 4e-4]
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from factorctl.config.shape import FactorShape, factor_shape

Text = Literal["valid", "select"]
STATIC = "static"
"""The method that routes nothing: the most important neurons alone, as many as the routed split has active."""


@dataclass(frozen=True)
class Split:
    """How each FFN is split."""

    num_experts: int
    top_k: int
    shared_fraction: float = 0.0

    def shape(self, intermediate_size: int) -> FactorShape:
        return factor_shape(
            intermediate_size,
            num_experts=self.num_experts,
            top_k=self.top_k,
            shared_fraction=self.shared_fraction,
        )


SPLITS: Mapping[str, Split] = {
    "75-72": Split(72, 48, 0.25),
    "53-8": Split(8, 3, 0.25),
    "48-32": Split(32, 10, 0.25),
    "50-72": Split(72, 24, 0.25),
    "25-84": Split(84, 12, 0.125),
    "50-2of4": Split(4, 2),
    # experts of the same five sizes at every share: 192 to 12 of the demo's neurons
    **{f"75-{6 * n}": Split(6 * n, 4 * n, 0.25) for n in (1, 2, 4, 8, 16)},
    **{f"50-{6 * n}": Split(6 * n, 2 * n, 0.25) for n in (1, 2, 4, 8, 16)},
    **{f"25-{7 * n}": Split(7 * n, n, 0.125) for n in (1, 2, 4, 8, 16)},
    **{f"{25 * q}-{2 * q * n}of{8 * n}": Split(8 * n, 2 * q * n) for q in (1, 2, 3) for n in (1, 2, 4, 8, 16)},
}
"""Active share of the neurons, then the experts: beside shared ones, or `K of N` where nothing is shared."""
DEMO_NEURONS = 1536


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    split: str
    method: str
    """A partition strategy, or `static`."""
    tokens: int = 0
    """Trained on; 0 measures what `factorize` gave."""
    factorize: Mapping[str, Any] = field(default_factory=dict)
    """Options of `factorize` beside the common ones."""
    finetune: Mapping[str, Any] = field(default_factory=dict)
    """Options of `finetune` that are not the preset's."""
    seed: int = 0
    text: Text = "valid"
    """What is reported is measured on `valid`; options are chosen on `select`."""
    curve: int = 0
    """Also measure every so many tokens of the training."""
    tasks: bool = False
    """Also score the tasks, beside the dense model."""
    seconds: int = 0
    """Train on fewer tokens if these take longer; all cells of a split then take as many as the first one of it."""

    @property
    def name(self) -> str:
        options = [f"{key}={shown(value)}" for part in (self.factorize, self.finetune) for key, value in part.items()]
        return "/".join([self.split, self.method, str(self.tokens), *options, f"seed={self.seed}", self.text])

    def shape(self, intermediate_size: int) -> FactorShape:
        """Of the split, or of its static control: the same number of active neurons, all of them shared."""
        shape = SPLITS[self.split].shape(intermediate_size)
        if self.method != STATIC:
            return shape
        active = shape.active_neurons
        rest = intermediate_size - active
        experts = next(n for n in (4, 8, 6, 5, 3, 2) if rest % n == 0 and rest > n)
        return FactorShape(experts, 0, rest // experts, active)

    def factorize_options(self, intermediate_size: int) -> dict[str, Any]:
        """The fields of a `FactorizeConfig` that decide this cell's checkpoint."""
        shape = self.shape(intermediate_size)
        # who routes nothing need not cluster what it leaves out
        strategy = "contiguous" if self.method == STATIC else self.method
        return {
            "num_experts": shape.num_experts,
            "top_k": shape.top_k,
            "shared_fraction": shape.shared_size / intermediate_size,
            "strategy": strategy,
            "refit": True,
            "seed": self.seed,
            **self.factorize,
        }

    def record(self) -> dict[str, Any]:
        return asdict(self)


REPLY = "@@ "
"""Begins a line of standard output that is a result; libraries print what they like."""


@dataclass(frozen=True)
class Site:
    """Where and how large everything is; the same for all jobs of a run."""

    model: str
    """A Hugging Face directory."""
    work: str
    train: str
    """DATA to train and calibrate on."""
    texts: Mapping[str, str]
    """`valid` and `select`."""
    tasks: str | None = None
    """Directory of task files."""
    task_names: tuple[str, ...] = ()
    task_limit: int | None = None
    task_batch: int = 16
    device: str = "auto"
    threads: int = 1
    calibration_tokens: int = 16_384
    heldout_tokens: int = 16_384
    """Of the training text, for what `finetune` itself measures."""
    measured_tokens: int = 131_072
    curve_tokens: int = 32_768
    document_tokens: int = 1024
    block_length: int = 1024

    @property
    def home(self) -> Path:
        return Path(self.work)


def shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "+".join(f"{key}:{shown(inner)}" for key, inner in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_plan(file: Path, *, routed: str = "routed") -> list[Cell]:
    """The cells of a TOML file.

    Args:
        routed: the strategy that a plan's `routed` stands for.

    Raises:
        TypeError: a key is no field of a cell.
        KeyError: an unknown split.
    """
    with file.open("rb") as stream:
        tables = tomllib.load(stream)["cells"]
    cells = [Cell(**options) for table in tables for options in combinations(table)]
    cells = [replace(cell, method=routed) if cell.method == "routed" else cell for cell in cells]
    return unique([canonical(cell) for cell in cells])


def canonical(cell: Cell) -> Cell:
    """Without options that decide nothing; splits with as many active neurons have one static control."""
    if not cell.tokens:
        cell = replace(cell, finetune={}, curve=0)
    if cell.method != STATIC:
        return cell
    active = {name: split.shape(DEMO_NEURONS).active_neurons for name, split in SPLITS.items()}
    return replace(cell, split=next(name for name in SPLITS if active[name] == active[cell.split]))


def unique(cells: list[Cell]) -> list[Cell]:
    return list({cell.name: cell for cell in cells}.values())


def combinations(table: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the lists in a table, nested tables included."""
    axes = [list(_choices(value)) for value in table.values()]
    for chosen in itertools.product(*axes):
        yield dict(zip(table, chosen, strict=True))


def _choices(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for item in value:
            yield from _choices(item)
    elif isinstance(value, Mapping):
        yield from combinations(value)
    else:
        yield value
