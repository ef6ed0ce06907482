"""One frozen dataclass per verb: everything that decides its result, so that a manifest can record it whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from factorctl.errors import UsageError

Device = Literal["auto", "cpu", "cuda"]
DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
Gate = Literal["softmax", "hard"]
ScaleRule = Literal["sum", "paper", "fitted"]
RouterInit = Literal["analytic", "random"]

DEFAULT_WORKSPACE = Path("runs")
MIN_EXPERTS, MAX_EXPERTS = 2, 128


@dataclass(frozen=True)
class FactorShape:
    """The sizes of a factored FFN: S + N*H = F."""

    num_experts: int
    top_k: int
    expert_size: int
    shared_size: int

    @property
    def intermediate_size(self) -> int:
        return self.shared_size + self.num_experts * self.expert_size

    @property
    def routes(self) -> bool:
        """Whether there is a choice between experts: 0 < K < N."""
        return 0 < self.top_k < self.num_experts

    @property
    def active_neurons(self) -> int:
        return self.shared_size + self.top_k * self.expert_size

    @property
    def active_ffn_fraction(self) -> float:
        return self.active_neurons / self.intermediate_size

    @property
    def notation(self) -> str:
        """rKeN notation of FactorLLM, e.g. '1R4E2K'; shared neurons are appended as '+S384'."""
        base = f"1R{self.num_experts}E{self.top_k}K"
        return base if self.shared_size == 0 else f"{base}+S{self.shared_size}"


def factor_shape(intermediate_size: int, *, num_experts: int, top_k: int | None, shared_fraction: float) -> FactorShape:
    """Sizes for a dense FFN of `intermediate_size` neurons; `top_k` defaults to half the experts.

    The shared size is the multiple of `num_experts` granularity nearest to `shared_fraction * F` that leaves
    equal experts, so that S + N*H = F exactly.

    Raises:
        UsageError: when no equal split exists or K does not fit, naming the nearest valid values.
    """
    if not MIN_EXPERTS <= num_experts <= MAX_EXPERTS:
        raise UsageError(
            f"--experts {num_experts} is out of range", f"choose a number from {MIN_EXPERTS} to {MAX_EXPERTS}"
        )
    if not 0 <= shared_fraction < 1:
        raise UsageError(
            f"--shared-fraction {shared_fraction:g} is out of range",
            "choose a number from 0 up to, not including, 1",
        )
    if shared_fraction == 0:
        shared_size = 0
        if intermediate_size % num_experts:
            raise UsageError(
                f"--experts {num_experts} does not divide intermediate_size {intermediate_size}",
                _other_splits(nearest_divisors(intermediate_size, num_experts)),
            )
    else:
        shared_size = nearest_shared_size(intermediate_size, num_experts, shared_fraction)
    chosen_k = num_experts // 2 if top_k is None else top_k
    if not 0 <= chosen_k <= num_experts:
        raise UsageError(
            f"--top-k {chosen_k} does not fit {num_experts} experts",
            f"choose a number from 0 to {num_experts}",
        )
    if chosen_k == 0 and shared_size == 0:
        raise UsageError(
            "--top-k 0 leaves no active neuron",
            "add --shared-fraction 0.5 (static pruning to half the neurons), or choose --top-k 1 or more",
        )
    return FactorShape(
        num_experts=num_experts,
        top_k=chosen_k,
        expert_size=(intermediate_size - shared_size) // num_experts,
        shared_size=shared_size,
    )


def nearest_divisors(intermediate_size: int, wanted: int) -> list[int]:
    """The numbers of experts on either side of `wanted` that divide `intermediate_size`."""
    valid = [n for n in range(MIN_EXPERTS, MAX_EXPERTS + 1) if intermediate_size % n == 0]
    below = [n for n in valid if n < wanted][-1:]
    above = [n for n in valid if n > wanted][:1]
    return below + above


def nearest_shared_size(intermediate_size: int, num_experts: int, shared_fraction: float) -> int:
    """The S > 0 nearest to `shared_fraction * F` for which the other neurons split into N equal experts.

    Raises:
        UsageError: when every such S leaves the experts empty.
    """
    wanted = shared_fraction * intermediate_size
    remainder = intermediate_size % num_experts
    sizes = range(remainder or num_experts, intermediate_size - num_experts + 1, num_experts)
    if not sizes:
        raise UsageError(
            f"--experts {num_experts} with shared neurons does not fit intermediate_size {intermediate_size}",
            f"try --experts {max(MIN_EXPERTS, intermediate_size // 4)} or fewer",
        )
    return min(sizes, key=lambda size: (abs(size - wanted), size))


def _other_splits(divisors: list[int]) -> str:
    """Shared neurons take up what a number of experts leaves over."""
    with_shared = "--shared-fraction 0.25, with which the number need not divide it"
    return f"try {' or '.join(map(str, divisors))}, or {with_shared}" if divisors else f"add {with_shared}"


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """What every verb takes."""

    out: Path | None = None
    """Where the result goes; None means a name in the workspace, and for `profile` no file."""
    workspace: Path = DEFAULT_WORKSPACE
    seed: int = 0
    device: Device = "auto"
    dtype: DTypeName = "auto"
    """Storage dtype of what is made, compute dtype of what is measured; auto keeps the one that is stored, but measures
    in float32 where bfloat16 would only be emulated."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed {self.seed} is out of range", "choose a number from 0 to 4294967295")


def _require_positive(option: str, number: int | None, hint: str | None = None) -> None:
    if number is not None and number < 1:
        raise UsageError(f"{option} {number} is no positive number", hint)


class Split(NamedTuple):
    """How an FFN is split, before its width is known."""

    num_experts: int
    top_k: int | None = None
    shared_fraction: float = 0.0
    scale: ScaleRule = "sum"


RECOMMENDED = Split(8, 3, 0.25, "fitted")
"""About half of the FFN active. Of what changes no value, the best perplexity for its speed: docs/design.md has the
numbers. 32 experts are no better and slower on a CPU."""


CALIBRATION_TOKENS = 16_384
"""Held-out perplexity gains less than 1% beyond, and on a CPU every token is waited for: docs/design.md."""


@dataclass(frozen=True)
class FactorizeConfig(CommonConfig):
    """`factorctl factorize`."""

    model: str
    """Hub id, alias, local directory, .gguf file or pypi:PACKAGE==VERSION."""
    num_experts: int | None = None
    """None means `RECOMMENDED`, whatever of it is not given."""
    top_k: int | None = None
    """Routed experts active per token; None means half of them."""
    shared_fraction: float | None = None
    """None means none where `num_experts` is given."""
    strategy: str | None = None
    """None means `routed` where a router is fitted to text, else `clustered`."""
    strategy_options: Mapping[str, str] = field(default_factory=dict)
    router: RouterInit = "analytic"
    gate: Gate = "softmax"
    scale: ScaleRule | None = None
    """None means `sum` where `num_experts` is given."""
    refit: bool = False
    load_limit: float | None = None
    """The most calibration tokens that may choose one expert, in even shares (K/N of all)."""
    calibration: str = "self"
    calibration_tokens: int = CALIBRATION_TOKENS
    text_field: str | None = None
    """Of the calibration text's rows."""
    revision: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive("--calibration-tokens", self.calibration_tokens, f"try {CALIBRATION_TOKENS}")
        if self.load_limit is not None and not 1 <= self.load_limit < float("inf"):
            raise UsageError(
                f"--load-limit {self.load_limit:g} is out of range", "choose 1 (even) or more, for example 1.5"
            )
        if self.load_limit is not None and self.router != "analytic":
            raise UsageError("--load-limit needs a fitted router", "leave --router random out")

    @property
    def split(self) -> Split:
        """The split that is meant, with nothing left open but `top_k`."""
        default = RECOMMENDED if self.num_experts is None else Split(self.num_experts)
        return Split(
            default.num_experts,
            default.top_k if self.top_k is None else self.top_k,
            default.shared_fraction if self.shared_fraction is None else self.shared_fraction,
            default.scale if self.scale is None else self.scale,
        )

    def resolved(self) -> FactorizeConfig:
        """The same with its split and strategy spelled out."""
        split = self.split
        routes = self.router == "analytic" and split.top_k not in (0, split.num_experts)
        return replace(self, **split._asdict(), strategy=self.strategy or ("routed" if routes else "clustered"))

    def shape_for(self, intermediate_size: int) -> FactorShape:
        """The sizes that this gives an FFN of so many neurons.

        Raises:
            UsageError: see `factor_shape`.
        """
        num_experts, top_k, shared_fraction, _ = self.split
        return factor_shape(intermediate_size, num_experts=num_experts, top_k=top_k, shared_fraction=shared_fraction)


PresetName = Literal["default", "factorllm"]
TrainedPart = Literal["router", "experts", "all"]
OptimizerName = Literal["adamw", "adam", "adamw-8bit", "muon"]
Selection = Literal["unit", "stored"]
RefreshTarget = Literal["labels", "benefits"]
LabelSource = Literal["student", "teacher"]
TeacherStorage = Literal["none", "bf16", "8bit", "4bit"]
Precision = Literal["auto", "float32", "bfloat16"]
Tracker = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True)
class FinetuneConfig(CommonConfig):
    """`factorctl finetune`. What is None takes the preset's or the checkpoint's value."""

    tokens: int
    """Tokens to train on."""
    checkpoint: Path | None = None
    """A native checkpoint; None means the newest in the workspace."""
    top_k: int | None = None
    data: str | None = None
    """None means the default pretraining sample of the Hub."""
    text_field: str | None = None
    preset: PresetName = "default"
    loss_weights: Mapping[str, float] = field(default_factory=dict)
    """Overrides of the preset, by loss: lm, par, kd, mse, balance, z."""
    temperature: float | None = None
    gate: Gate | None = None
    scale: ScaleRule | None = None
    train: TrainedPart = "all"
    router_warmup: int = 0
    """Tokens at the start during which only the routers learn."""
    labels_from: LabelSource | None = None
    """Whose neurons PAR's labels compare, behind the student's down-projection."""
    router_refresh: int = 0
    """Tokens between two closed-form fits of the routers; 0 means none."""
    refresh_target: RefreshTarget = "labels"
    """What these fits predict: which experts PAR's labels name, or how much each would take off the error."""
    straight_through: bool = False
    """Let the outputs of all experts inform the choice, also of those that did not run."""
    heal_tokens: int = 0
    """Tokens at the start during which each layer learns its dense FFN's output on its own input."""
    optimizer: OptimizerName | None = None
    lr: float | None = None
    router_lr: float | None = None
    selection: Selection | None = None
    """At which scale routers are trained: `unit`, logits that differ by 1, or as `stored`."""
    router_temperature: float | None = None
    """Of the logits in the routers' own losses."""
    sharpness_lr: float | None = None
    """Of the number by which each layer's gates are sharper than the choice; 0 keeps it."""
    weight_decay: float | None = None
    clip_norm: float | None = None
    batch_tokens: int | None = None
    """Tokens per optimiser step, over all processes."""
    block_length: int = 1024
    """Tokens of a training sequence."""
    micro_batch: int | None = None
    """Sequences that one process takes through the model at once."""
    heldout_tokens: int = 16_384
    max_epochs: float = 4.0
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    teacher: str | None = None
    """The dense source, where the checkpoint's own values are no longer the dense ones."""
    teacher_quant: TeacherStorage = "none"
    save_every: int | None = None
    """Tokens between two saved states; None means a tenth of all."""
    resume: bool = False
    track: tuple[Tracker, ...] = ()
    overwrite: bool = False


ExportTarget = Literal["hf", "gguf", "dense", "bnb-4bit", "bnb-8bit"]
Arch = Literal["auto", "mixtral", "granite-moe-shared", "granite-moe-hybrid", "qwen2-moe", "qwen3-moe", "glm4-moe"]


@dataclass(frozen=True)
class ExportConfig(CommonConfig):
    """`factorctl export`."""

    checkpoint: Path | None = None
    """A native checkpoint; None means the newest in the workspace."""
    target: ExportTarget = "hf"
    arch: Arch = "auto"
    """Stock transformers architecture; auto is the one that most engines run right."""
    pad_experts: int | Literal["auto"] = "auto"
    """Experts get neurons of zeros up to a multiple of this; auto: of 32 where an engine or a storage type asks it."""
    quant: str = "auto"
    """GGUF storage type; auto keeps the export's dtype (f32, f16 or bf16)."""
    exact: bool = False
    """Refuse whatever is only near the native function (gate `hard` at K > 1)."""
    untie_lm_head: bool = False
    max_shard_bytes: int = 2_000_000_000
    """Also bounds memory: one shard is built at a time."""
    verify_gguf: bool = False
    """Demand that llama.cpp itself runs the file before it is published."""
    accept_difference: float | None = None
    """KL in nats per token up to which rounding may move the model; None leaves near ties out of the judgement."""
    push: str | None = None
    """Hub repository that the finished export is uploaded to."""
    private: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive("--pad-experts", None if self.pad_experts == "auto" else self.pad_experts, "1 adds none")


@dataclass(frozen=True)
class ProfileConfig(CommonConfig):
    """`factorctl profile`."""

    checkpoint: Path | None = None
    """A native checkpoint; None means the newest in the workspace."""
    batch: tuple[int, ...] = (1, 8)
    prompt: tuple[int, ...] = (128, 512)
    decode_tokens: int = 8
    """Decoding steps after each prefill, each one a sample."""
    rounds: int = 10
    seconds: float = 60.0
    """Begin no further round of a regime after this long, once there are three."""
    top_k: int | None = None
    scale: ScaleRule | None = None
    data: str = "self"
    """Text that decides the routing: DATA, or `random` for random tokens."""
    text_field: str | None = None
    latency: bool = True
    sweep_k: bool = False
    """Also count the FLOPs of every other number of active experts."""
    tune: bool = False
    """Time the execution paths first, and cache what is fastest on this machine."""
    require_quiet: bool = False
    """Refuse to measure on a busy machine instead of marking the report."""
    html: Path | None = None
    plots: Path | None = None
    """Directory for the PNG files."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, values in (("--batch", self.batch), ("--prompt", self.prompt), ("--rounds", (self.rounds,))):
            if not values or min(values) < 1:
                listed = ",".join(str(value) for value in values) or "nothing"
                raise UsageError(f"{option} {listed} holds no positive numbers only", f"for example {option} 1,8")
        _require_positive("--decode-tokens", self.decode_tokens, "try 8")


Controls = Literal["none", "fast", "all"]


@dataclass(frozen=True)
class EvalConfig(CommonConfig):
    """`factorctl eval`."""

    checkpoint: str | None = None
    """A native checkpoint, an export, any Hugging Face directory or Hub id; None means the newest in the workspace."""
    against: str | None = None
    """What it is compared with, in the same forms; None means the dense source that the manifest records."""
    tasks: tuple[str, ...] = ()
    """lm-eval tasks; `paper` stands for FactorLLM's eight."""
    task_data: Path | None = None
    """Directory with one JSONL per task, for where no Hub can be reached."""
    data: tuple[str, ...] = ()
    """Texts for perplexity, each a DATA of its own."""
    text_field: str | None = None
    data_tokens: int = 100_000
    """Tokens taken from each text."""
    document_tokens: int | None = None
    """Tokens taken from the beginning of each document; None means all of it."""
    window: int = 1024
    """Tokens that a prediction may look at, its own window's; less where the model's context is shorter."""
    stride: int | None = None
    """Tokens between the starts of two windows; None means half a window."""
    fidelity: bool = True
    """Hold every factored FFN against its dense one."""
    controls: Controls = "none"
    calibration: str | None = None
    """Text that controls are calibrated on; None means what the checkpoint was calibrated on, else `self`."""
    calibration_tokens: int = 16_384
    limit: int | None = None
    """Documents per task; None means all."""
    few_shot: int | None = None
    """Examples before each question; None means the task's own number."""
    batch_size: int | Literal["auto"] = "auto"
    """Sequences at once in tasks; auto finds what memory holds."""
    samples: Path | None = None
    """Directory for the answers to every document; None means `out`."""
    report: Path | None = None
    """File for the Markdown report."""
    resume: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive("--limit", self.limit)
        _require_positive("--data-tokens", self.data_tokens)
        _require_positive("--document-tokens", self.document_tokens)
        _require_positive("--calibration-tokens", self.calibration_tokens)
        _require_positive("--batch-size", None if self.batch_size == "auto" else self.batch_size)
        if self.few_shot is not None and self.few_shot < 0:
            raise UsageError(f"--few-shot {self.few_shot} is out of range", "choose 0 or more examples")
