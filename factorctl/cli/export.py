"""`factorctl export`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from factorctl.cli.command import Asked
from factorctl.cli.options import OutputFormat
from factorctl.config.export import ExportConfig

if TYPE_CHECKING:
    from factorctl.pipeline.export.plan import ExportPlan
    from factorctl.pipeline.export.run import ExportResult


def export(config: ExportConfig, asked: Asked) -> None:
    """Turn a native checkpoint into what unmodified stock engines run, and prove that it computes the same.

    The export is loaded in the stock engine and its logits are compared with the native model's before it is published;
    if they differ, nothing is. What a target cannot hold is refused by name.

    Examples:

        factorctl export runs/demo-1R4E2K

        factorctl export runs/demo-1R4E2K --to gguf --quant q8_0
    """
    from factorctl.cli.render import progress_listener
    from factorctl.pipeline.export.plan import plan_export
    from factorctl.pipeline.export.run import export as run_export

    progress = progress_listener(quiet=asked.quiet)
    if asked.dry_run:
        _show_plan(plan_export(config, progress), asked.output)
    else:
        _show_result(run_export(config, progress), asked.output)


def _show_plan(plan: ExportPlan, output: OutputFormat) -> None:
    from factorctl.cli.render import gigabytes, show_plan

    facts: dict[str, object] = {
        "checkpoint": str(plan.job.checkpoint.path),
        "notation": plan.job.checkpoint.spec.shape.notation,
        "format": plan.job.config.target,
        "architecture": plan.job.form.architecture,
        "dtype": plan.job.form.dtype,
        "weight_files": plan.writer.num_shards or 1,
        "disk_bytes": plan.disk_bytes,
        "memory_bytes": plan.memory_bytes,
        "out": str(plan.out),
    }
    words = {**facts, "disk_bytes": gigabytes(plan.disk_bytes), "memory_bytes": gigabytes(plan.memory_bytes)}
    show_plan(facts, words, output=output)


def _show_result(result: ExportResult, output: OutputFormat) -> None:
    from factorctl.cli.render import facts_table, gigabytes, show

    facts: dict[str, object] = {
        "format": f"{result.format}, {result.architecture}, {result.dtype}",
        "compared in": f"{result.engine}, {result.tokens_compared} tokens",
        "largest logit error": result.max_logit_error,
        "top-1 agreement": None if result.top1_agreement is None else f"{result.top1_agreement:.2%}",
        "KL (nats per token)": result.kl,
    }
    if result.all_experts_error is not None:
        facts["every expert on"] = f"logits within {result.all_experts_error:.1g} of their spread"
    if result.near_ties:
        facts["near ties"] = f"{result.near_ties:.2%} of the decisions; {result.tokens_judged} tokens before the first"
    if result.changed_choices:
        facts["experts changed"] = (
            f"{result.changed_choices:.2%} of the decisions; else KL {result.kl_same_experts:.2g}"
        )
    if result.scale_rounding is not None:
        facts["scale folded in"] = "bit-exact" if result.scale_rounding == 0 else f"rounds {result.scale_rounding:.1e}"
    if result.selection_agreement is not None:
        facts["experts chosen alike"] = f"{result.selection_agreement:.3%}, gates off 1/K by {result.gate_error:.1e}"
    if result.identical_to_source is not None:
        facts["the source, bit for bit"] = result.identical_to_source
    if result.memory_bytes is not None:
        facts["weights in memory"] = gigabytes(result.memory_bytes)
    if result.bits_per_weight is not None:
        facts["bits per weight"] = f"{result.bits_per_weight:.2f}"
    facts |= {
        "on disk": f"{gigabytes(result.bytes)} in {result.files} files",
        "time": f"{result.seconds:.1f} s",
        "written to": result.path,
    }
    if result.commit is not None:
        facts["pushed as"] = result.commit
    table = facts_table(f"Exported {result.notation}", facts)
    show(result, output=output, tables=[table], closing=_next_steps(result))


def _next_steps(result: ExportResult) -> list[str]:
    first, *others = result.next_steps
    return [f"Next: {first}", *(f"      {step}" for step in others)]
