"""What routing has to beat, and what bounds it: other ways to spend the same active FFN neurons.

| name             | what runs                                                                    |
|------------------|------------------------------------------------------------------------------|
| `static`         | the most important neurons, the same for every token                         |
| `static_refit`   | the same, W_down refitted in closed form                                     |
| `random_routing` | the checkpoint's experts, chosen at random                                   |
| `oracle_routing` | the checkpoint's experts, chosen by the teacher's labels on the model's own stream |
| `all_experts`    | the checkpoint's experts, all of them: all neurons are active                |
| `ffn_skip`       | FFN-SkipLLM: whole FFN blocks of the middle layers left out, token by token  |
| `ffn_skip_paper` | the same at the paper's own share, a quarter of the blocks left out          |
| `moefication`    | MoEfication's split with its training-free selection                         |
| `knowledge_factor` | the checkpoint's experts, chosen once for every domain of text             |

Each is made in memory when its turn comes, measured and let go of; nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorctl.checkpoint.reader import CheckpointReader
from factorctl.config.evaluate import Controls, EvalConfig
from factorctl.config.factorize import CALIBRATION_TOKENS, FactorizeConfig
from factorctl.config.shape import FactorShape
from factorctl.data.spec import parse_data_spec
from factorctl.data.tokenizing import tokenize_documents
from factorctl.evaluation.ffn_skipping import PAPER_SHARE, calibrate_threshold, skipping_ffns
from factorctl.evaluation.routing_overrides import OracleChoice, RandomChoice, choosing
from factorctl.ffn.dense import cast_ffn, dense_output
from factorctl.ffn.labels import Teacher
from factorctl.ffn.layer import FactoredFFN
from factorctl.ffn.spec import FactoredSpec
from factorctl.models.building import factored_ffns
from factorctl.models.domain_fit import READ_PER_TOKEN, TEXT_TOKENS, DomainText, fit_domains
from factorctl.models.families import DenseModel, read_dense_model
from factorctl.models.loading import NativeCheckpoint
from factorctl.pipeline.common.calibration import calibration_blocks
from factorctl.pipeline.common.recorded_source import holds_dense_values
from factorctl.pipeline.common.subjects import ComparedModel, load_model
from factorctl.pipeline.evaluate.control_models import moefication_model, static_model
from factorctl.progress import Progress
from factorctl.training.teacher import TeacherFFN, own_tensors


@dataclass
class Runner:
    """A model that is ready to be measured."""

    model: PreTrainedModel
    active_share: Callable[[], float | None]
    """Part of the FFN neurons that ran, on average over tokens, since the last `restart`; None where nobody knows."""
    restart: Callable[[], None] = lambda: None
    """Called in front of each measurement: the same draws, and counts from zero."""
    name_rows: Callable[[Sequence[str | None]], None] = lambda _: None
    """Called in front of each batch of text, with the domains that its rows name."""


@dataclass
class ControlKit:
    """What controls are made from."""

    config: EvalConfig
    model: ComparedModel
    reference: ComparedModel
    """The dense source."""
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    device: torch.device
    progress: Progress

    @property
    def native(self) -> NativeCheckpoint:
        assert self.model.native is not None, "controls are made for native checkpoints"
        return self.model.native

    @property
    def shape(self) -> FactorShape:
        return self.native.spec.shape

    @property
    def dense(self) -> DenseModel:
        return read_dense_model(self.reference.path)

    @cached_property
    def ids_BL(self) -> torch.Tensor:
        """The calibration tokens of the controls."""
        assert self.reference.source is not None
        assert self.reference.description is not None
        calibration, text_field = calibration_text(self.config, self.model)
        config = FactorizeConfig(
            model=str(self.reference.path),
            num_experts=2,
            calibration=calibration,
            text_field=text_field,
            calibration_tokens=self.config.calibrated_on,
            seed=self.config.seed,
        )
        description = dict(self.reference.description)
        blocks = calibration_blocks(self.reference.source, self.dense, description, config, self.progress)
        return torch.from_numpy(blocks.train.astype("int64"))

    @cached_property
    def texts(self) -> list[DomainText]:
        """Texts with their domains: calibration documents, or blocks of what the model wrote, which name none."""
        calibration, text_field = calibration_text(self.config, self.model)
        spec = parse_data_spec(calibration, text_field=text_field, option="--calibration")
        if spec.uses_self:
            return [DomainText(ids_L, None) for ids_L in self.ids_BL.tolist()]
        found = tokenize_documents(
            spec,
            self.tokenizer,
            max_tokens=READ_PER_TOKEN * self.config.calibrated_on,
            max_document_tokens=TEXT_TOKENS,
            seed=self.config.seed,
            progress=self.progress,
        )
        return [DomainText(document.ids, document.domain) for document in found]

    def load(self, model: ComparedModel, top_k: int | None = None) -> PreTrainedModel:
        with self.progress.stage(f"Loading {model.id}"):
            return load_model(model, dtype=self.dtype, device=self.device, top_k=top_k)


def calibration_tokens(config: EvalConfig, model: ComparedModel) -> int:
    """`--calibration-tokens`, else as many as `factorize` recorded: controls are to have no better and no worse."""
    recorded = model.manifest.config.get("calibration_tokens") if model.manifest is not None else None
    known = recorded if isinstance(recorded, int) and not isinstance(recorded, bool) and recorded > 0 else None
    return config.calibration_tokens or known or CALIBRATION_TOKENS["cpu"]


def calibration_text(config: EvalConfig, model: ComparedModel) -> tuple[str, str | None]:
    """`--calibration`, else what `factorize` recorded that it calibrated on, else `self`; and its `--text-field`."""
    recorded = model.manifest.config if model.manifest is not None else {}
    if config.calibration or not isinstance(recorded.get("calibration"), str):
        return config.calibration or "self", config.text_field
    field = recorded.get("text_field")
    return str(recorded["calibration"]), field if isinstance(field, str) else None


@contextmanager
def static(kit: ControlKit, *, refit: bool) -> Iterator[Runner]:
    """Static pruning by importance to the checkpoint's number of active neurons."""
    active = kit.shape.active_neurons
    model = static_model(
        kit.reference.path,
        active,
        kit.ids_BL,
        refit=refit,
        dtype=kit.dtype,
        device=kit.device,
        progress=kit.progress,
    )
    yield Runner(model, lambda: kit.shape.active_ffn_fraction)


@contextmanager
def random_routing(kit: ControlKit) -> Iterator[Runner]:
    """The checkpoint with experts drawn at random, anew for every token."""
    choices: list[RandomChoice] = []

    def choose(layer: int, ffn: FactoredFFN) -> RandomChoice:
        choices.append(RandomChoice(ffn, seed=kit.config.seed, layer=layer))
        return choices[-1]

    def restart() -> None:
        for choice in choices:
            choice.restart()

    model = kit.load(kit.model)
    with choosing(model, choose):
        yield Runner(model, lambda: kit.shape.active_ffn_fraction, restart)


@contextmanager
def oracle_routing(kit: ControlKit) -> Iterator[Runner]:
    """The checkpoint with the experts that the teacher's labels name."""
    model, teacher_of = kit.load(kit.model), oracle_teachers(kit)
    with choosing(model, lambda layer, ffn: OracleChoice(ffn, teacher_of(layer, ffn))):
        yield Runner(model, lambda: kit.shape.active_ffn_fraction)


def oracle_teachers(kit: ControlKit) -> Callable[[int, FactoredFFN], Teacher]:
    """The dense FFNs: the checkpoint's own values where they still are the dense ones, else a second copy in memory."""
    if holds_dense_values(kit.native.manifest):
        return lambda _, ffn: TeacherFFN(ffn, own_tensors(ffn))
    dense_ffn_of = dense_ffns(kit.reference, kit.dtype, kit.device)
    return lambda layer, _: dense_ffn_of(layer)


def dense_ffns(reference: ComparedModel, dtype: torch.dtype, device: torch.device) -> Callable[[int], Teacher]:
    """The dense source's FFN of a layer as a function, read when it is asked for."""
    dense, reader = read_dense_model(reference.path), CheckpointReader(reference.path)

    def of(layer: int) -> Teacher:
        ffn = cast_ffn(dense.read_ffn(layer, reader.read), dtype, device)
        return lambda x_TD: dense_output(ffn, dense.activation, x_TD)

    return of


@contextmanager
def all_experts(kit: ControlKit) -> Iterator[Runner]:
    """The checkpoint at K = N."""
    yield Runner(kit.load(kit.model, top_k=kit.shape.num_experts), lambda: 1.0)


@contextmanager
def ffn_skip(kit: ControlKit, share: float) -> Iterator[Runner]:
    """The dense model with FFN blocks left out, the threshold set so that this share of them runs."""
    model = kit.load(kit.reference)
    with skipping_ffns(model, post_ffn_norm=kit.dense.family.post_ffn_norm) as state:
        with kit.progress.stage("Calibrating FFN-SkipLLM"):
            found = calibrate_threshold(model, state, kit.ids_BL, share)
        if found > share + 0.02:
            kit.progress.note(f"FFN-SkipLLM: at least {found:.0%} of the FFN blocks run, the outer ones always")
        yield Runner(model, lambda: state.share_run, state.restart)


@contextmanager
def moefication(kit: ControlKit) -> Iterator[Runner]:
    """MoEfication without training, at the checkpoint's number of active neurons."""
    model, shape = moefication_model(
        kit.reference.path,
        kit.shape.active_neurons,
        seed=kit.config.seed,
        dtype=kit.dtype,
        device=kit.device,
        progress=kit.progress,
    )
    yield Runner(model, lambda: shape.active_ffn_fraction)


@contextmanager
def knowledge_factor(kit: ControlKit) -> Iterator[Runner]:
    """The checkpoint with the shared neurons and, for all tokens of a text, its domain's own experts."""
    model = kit.load(kit.model)
    with kit.progress.stage("Choosing experts by domain"):
        fit = fit_domains(
            model,
            kit.texts,
            kit.config.calibrated_on,
            list(factored_ffns(model)),
            oracle_teachers(kit),
            seed=kit.config.seed,
        )
    kit.progress.note(f"KnowledgeFactor: experts were chosen for {', '.join(fit.domains.names)}")
    yield Runner(model, lambda: kit.shape.active_ffn_fraction, name_rows=fit.domains.name_rows)


@dataclass(frozen=True)
class Control:
    """One row of the table of controls."""

    title: str
    make: Callable[[ControlKit], AbstractContextManager[Runner]]
    needs_routing: bool = False
    """Means nothing where there is no choice between experts (K = 0)."""
    calibrates: bool = False
    fast: bool = True
    reference: str | None = None
    version: int = 1
    """Raised whenever the same options give another model, so that no result of the old one is reused."""


CONTROLS: Mapping[str, Control] = {
    "static": Control("static pruning", lambda kit: static(kit, refit=False), calibrates=True),
    "static_refit": Control("static pruning + refit", lambda kit: static(kit, refit=True), calibrates=True),
    "random_routing": Control("random routing", random_routing, needs_routing=True),
    "oracle_routing": Control("oracle routing", oracle_routing, needs_routing=True),
    "all_experts": Control("all experts on", all_experts, needs_routing=True),
    "ffn_skip": Control(
        "FFN-SkipLLM",
        lambda kit: ffn_skip(kit, kit.shape.active_ffn_fraction),
        calibrates=True,
        fast=False,
        reference="https://arxiv.org/abs/2404.03865",
        version=3,
    ),
    "ffn_skip_paper": Control(
        "FFN-SkipLLM at its own share",
        lambda kit: ffn_skip(kit, PAPER_SHARE),
        calibrates=True,
        fast=False,
        reference="https://arxiv.org/abs/2404.03865",
    ),
    "moefication": Control(
        "MoEfication, untrained", moefication, fast=False, reference="https://arxiv.org/abs/2110.01786"
    ),
    "knowledge_factor": Control(
        "KnowledgeFactor",
        knowledge_factor,
        needs_routing=True,
        calibrates=True,
        fast=False,
        reference="https://arxiv.org/abs/2207.03337",
    ),
}


def chosen_controls(wanted: Controls, spec: FactoredSpec) -> list[str]:
    """The controls that mean something for this checkpoint; at K = N nothing is left out, so none does.

    A checkpoint that chooses by domain is KnowledgeFactor itself.
    """
    shape, itself = spec.shape, "knowledge_factor" if spec.domains is not None else None
    if wanted == "none" or shape.top_k == shape.num_experts:
        return []
    return [
        name
        for name, control in CONTROLS.items()
        if (control.fast or wanted == "all") and (shape.top_k > 0 or not control.needs_routing) and name != itself
    ]
