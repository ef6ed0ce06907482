"""`factorctl finetune`."""

from __future__ import annotations

from shlex import quote
from typing import TYPE_CHECKING

from factorctl.cli.command import Asked
from factorctl.cli.options import OutputFormat
from factorctl.config.finetune import FinetuneConfig

if TYPE_CHECKING:
    from factorctl.pipeline.finetune.run import FinetuneResult, Rehearsal


def finetune(config: FinetuneConfig, asked: Asked) -> None:
    """Train routers and experts of a factorized checkpoint against its dense source.

    Attention, norms, embeddings and head stay frozen. States, metrics.jsonl and training.png go into OUT.training.
    With several processes: accelerate launch -m factorctl finetune ...

    Examples:

        factorctl finetune runs/demo-1R4E2K --tokens 60K --data notes.jsonl

        factorctl finetune --preset factorllm --top-k 2 --tokens 10M --data self
    """
    from factorctl.cli.render import progress_listener
    from factorctl.pipeline.finetune import run as pipeline

    progress = progress_listener(quiet=asked.quiet or not pipeline.is_reporting_process())
    if asked.dry_run:
        found = pipeline.rehearse(config, progress)
        if pipeline.is_reporting_process():
            _show_rehearsal(found, asked.output)
        return
    result = pipeline.finetune(config, progress)
    if pipeline.is_reporting_process():
        _show_result(result, asked.output)


def _show_rehearsal(found: Rehearsal, output: OutputFormat) -> None:
    from dataclasses import asdict

    from factorctl.cli.render import gigabytes, show_plan

    words = {
        "from": found.checkpoint,
        "notation": found.notation,
        "preset": found.preset,
        "tokens": f"{found.tokens:,} in {found.steps:,} steps of {found.batch_tokens:,}",
        "trained values": f"{found.trained_parameters:,}",
        "expected memory": f"{gigabytes(found.expected_memory_bytes)} per process",
        "peak of the measured steps": gigabytes(found.peak_memory_bytes),
        "speed": f"{found.tokens_per_second:,.0f} tokens/s",
        "time": f"about {_duration(found.seconds)}",
        "out": found.out,
    }
    show_plan(asdict(found), words, output=output)


def _show_result(result: FinetuneResult, output: OutputFormat) -> None:
    from factorctl.cli.render import facts_table, gigabytes, rows_table, show

    perplexities = rows_table(
        "Held-out perplexity",
        ["dense", "before", "after"],
        [[result.perplexity_dense, result.perplexity_before, result.perplexity_after]],
    )
    facts: dict[str, object] = {
        "notation": result.notation,
        "preset": result.preset,
        "tokens": f"{result.tokens:,} in {result.steps:,} steps, {result.epochs:.2f} epochs",
        "losses (held out)": "  ".join(f"{name} {value:.3f}" for name, value in result.losses.items()),
    }
    if result.router_agreement is not None and result.router_agreement_before is not None:
        before, after = result.router_agreement_before, result.router_agreement
        facts["router agreement"] = f"{before:.1%} before, {after:.1%} after"
        if result.par_of_chance is not None:  # None without routers: experts are chosen by domain
            facts["PAR (held out)"] = (
                f"{result.par_of_chance:.3f} by chance, {result.losses_before['par']:.3f} before, "
                f"{result.losses['par']:.3f} after"
            )
        facts["dead experts"] = ", ".join(f"layer {la} expert {e}" for la, e in result.dead_experts) or "none"
    facts |= {
        "speed": f"{result.tokens_per_second:,.0f} tokens/s",
        "time": _duration(result.seconds),
        "peak memory": gigabytes(result.peak_memory_bytes),
        "metrics": result.metrics,
        "picture": result.plot,
        "written to": result.checkpoint,
    }
    tables = [perplexities, facts_table("Finetuned", facts)]
    show(result, output=output, tables=tables, closing=[f"Next: factorctl eval {quote(result.checkpoint)} --data TEXT"])


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s"
