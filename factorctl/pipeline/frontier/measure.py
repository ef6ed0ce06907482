"""One split measured: how good it is on held-out text, how fast beside the dense model, what its export weighs."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from factorctl.evaluation.perplexity import TextScore, score_text
from factorctl.models.loading import load_dense
from factorctl.pipeline.frontier.plan import DECODE_TOKENS, FrontierPlan
from factorctl.pipeline.frontier.texts import SearchTexts
from factorctl.profiling.latency import measure_regime, text_batch
from factorctl.profiling.variants import make_dense
from factorctl.progress import Progress
from factorctl.reporting.statistics import Estimate, ratio_of_medians


@dataclass(frozen=True)
class Speed:
    """Times as fast as the dense model in the same runtime."""

    prefill: Estimate
    decode: Estimate


@dataclass(frozen=True)
class Quality:
    """On the held-out text."""

    perplexity: float
    accuracy: float


def dense_quality(plan: FrontierPlan, texts: SearchTexts, progress: Progress) -> Quality:
    model = load_dense(plan.source.path, dtype=plan.dtype, device=plan.device)
    return quality_of(model, plan, texts, "Judging the dense model", progress)


def quality_of(
    model: PreTrainedModel, plan: FrontierPlan, texts: SearchTexts, title: str, progress: Progress
) -> Quality:
    score: TextScore = score_text(
        model, texts.heldout, window=plan.window, stride=max(1, plan.window // 2), progress=progress, title=title
    )
    return Quality(score.perplexity, score.accuracy)


def speed_of(model: PreTrainedModel, plan: FrontierPlan, texts: SearchTexts, *, rounds: int) -> Speed:
    """Interleaved with the dense model, which is the same modules with every neuron on."""
    regime = plan.regime
    ids_BL = text_batch(texts.stream.to(plan.device), regime.batch, regime.prompt + DECODE_TOKENS)
    samples = measure_regime({"model": model, "dense": make_dense(model)}, ids_BL, regime, plan.effort(rounds))
    ours, dense = samples["model"], samples["dense"]
    seed = plan.config.seed
    return Speed(
        prefill=ratio_of_medians(dense.prefill_ms, ours.prefill_ms, seed=seed),
        decode=ratio_of_medians(dense.decode_ms, ours.decode_ms, seed=seed),
    )
