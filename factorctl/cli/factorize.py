"""`factorctl factorize`."""

from __future__ import annotations

from collections.abc import Mapping
from shlex import quote
from typing import TYPE_CHECKING

from factorctl.cli.command import Asked
from factorctl.cli.options import OutputFormat
from factorctl.config.factorize import FactorizeConfig

if TYPE_CHECKING:
    from factorctl.pipeline.factorize.plan import FactorizePlan
    from factorctl.pipeline.factorize.run import FactorizeResult


def factorize(config: FactorizeConfig, asked: Asked) -> None:
    """Split every FFN of a dense model into experts, without changing a weight value, and add a router.

    With all experts on, the result is the dense model; that is checked layer by layer before anything is published.
    An interrupted run goes on where it stopped when the same command is given again.

    Examples:

        factorctl factorize demo

        factorctl factorize meta/TinyLlama --experts 4

        factorctl factorize meta/TinyLlama --experts 16 --shared-fraction 0.25 --refit --calibration notes.jsonl
    """
    from factorctl.cli.render import progress_listener
    from factorctl.pipeline.factorize.plan import plan_factorize
    from factorctl.pipeline.factorize.run import factorize as run_factorize

    progress = progress_listener(quiet=asked.quiet)
    if asked.dry_run:
        _show_plan(plan_factorize(config, progress), asked.output)
    else:
        _show_result(run_factorize(config, progress), asked.output)


def _show_plan(plan: FactorizePlan, output: OutputFormat) -> None:
    from factorctl.cli.render import gigabytes, show_plan

    shape, seconds = plan.spec.shape, plan.expected_seconds()
    facts: dict[str, object] = {
        "source": plan.source.id,
        "notation": shape.notation,
        "num_experts": shape.num_experts,
        "top_k": shape.top_k,
        "shared_size": shape.shared_size,
        "expert_size": shape.expert_size,
        "active_ffn_fraction": shape.active_ffn_fraction,
        "strategy": plan.provenance.name,
        "calibrates": plan.calibrates,
        "calibration_tokens": plan.config.calibrated_on if plan.calibrates else 0,
        "layers": plan.dense.num_layers,
        "disk_bytes": plan.disk_bytes,
        "memory_bytes": plan.memory_bytes,
        "seconds": round(sum(seconds.values()), 1),
        "seconds_by_part": {part: round(spent, 1) for part, spent in seconds.items()},
        "out": str(plan.out),
    }
    words = {
        **facts,
        "disk_bytes": gigabytes(plan.disk_bytes),
        "memory_bytes": gigabytes(plan.memory_bytes),
        "seconds": _in_parts(seconds),
    }
    del words["seconds_by_part"]
    show_plan(facts, words, output=output)


def _in_parts(seconds: Mapping[str, float]) -> str:
    """The sum, and the parts that are more than a twentieth of it."""
    total = sum(seconds.values())
    large = sorted((part for part in seconds if seconds[part] > total / 20), key=lambda part: -seconds[part])
    return f"about {total:.0f} ({', '.join(f'{part} {seconds[part]:.1f}' for part in large)})"


def _show_result(result: FactorizeResult, output: OutputFormat) -> None:
    from factorctl.cli.render import facts_table, gigabytes, show

    refitted = result.refit_layers_kept is not None
    measured = "worst layer, before the refit" if refitted else "worst layer"
    facts: dict[str, object] = {
        "notation": result.notation,
        "experts": f"{result.num_experts} of {result.expert_size} neurons, {result.top_k} active",
        "shared neurons": result.shared_size,
        "active FFN": f"{result.active_ffn_fraction:.1%}",
        "strategy": result.strategy,
        "identity error": f"{result.identity_error:.1e} (all experts on against dense, {measured})",
    }
    if refitted:
        facts["refit"] = f"lowered the held-out error in {result.refit_layers_kept} of {result.num_layers} layers"
    if result.idle_experts:
        facts["idle experts"] = f"{result.idle_experts}, holding what hardly any token needs; inspect names them"
    facts |= {
        "time": f"{result.seconds:.1f} s",
        "peak memory": gigabytes(result.peak_rss_bytes),
        "written to": result.checkpoint,
    }
    closing = [
        f"Next: factorctl inspect {quote(result.checkpoint)}",
        f"      factorctl finetune {quote(result.checkpoint)} --data TEXT",
        f"      factorctl eval {quote(result.checkpoint)} --data TEXT --controls",
    ]
    show(result, output=output, tables=[facts_table(f"Factorized {result.source}", facts)], closing=closing)
