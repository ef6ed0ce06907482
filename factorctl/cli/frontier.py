"""`factorctl frontier`."""

from __future__ import annotations

from shlex import quote
from typing import TYPE_CHECKING

from factorctl.cli.command import Asked
from factorctl.cli.options import OutputFormat
from factorctl.config.frontier import FrontierConfig

if TYPE_CHECKING:
    from factorctl.cli.render import Table
    from factorctl.pipeline.frontier.plan import FrontierPlan
    from factorctl.pipeline.frontier.points import Point
    from factorctl.pipeline.frontier.result import FrontierResult


def frontier(config: FrontierConfig, asked: Asked) -> None:
    """Try splits of a model, measure what each costs and wins, and choose one for a budget.

    Routed splits stand beside static pruning to as many active neurons. With a budget the best split that meets it is
    timed once more and written as recipe.toml, for `factorctl run`. An interrupted search goes on when the same command
    is given again; so does one with another budget.

    Examples:

        factorctl frontier demo

        factorctl frontier demo --speed-up 1.3 --phase prefill

        factorctl frontier meta/TinyLlama --keep 0.9 --experts 8,32 --calibration notes.jsonl --time 30m
    """
    from factorctl.cli.render import progress_listener
    from factorctl.pipeline.frontier.plan import plan_frontier
    from factorctl.pipeline.frontier.run import frontier as run_frontier

    progress = progress_listener(quiet=asked.quiet)
    if asked.dry_run:
        _show_plan(plan_frontier(config, progress), asked.output)
    else:
        _show_result(run_frontier(config, progress), asked.output)


def _show_plan(plan: FrontierPlan, output: OutputFormat) -> None:
    from factorctl.cli.render import gigabytes, show_plan
    from factorctl.pipeline.frontier.splits import name_of

    seconds = plan.expected_seconds()
    facts: dict[str, object] = {
        "source": plan.source.id,
        "splits": [name_of(shape) for shape in plan.grid],
        "partitions": len(plan.families),
        "calibration_tokens": plan.config.calibration_tokens,
        "heldout_tokens": plan.config.data_tokens,
        "memory_bytes": plan.memory_bytes,
        "seconds": round(seconds, 1),
        "out": str(plan.out),
    }
    words = {
        **facts,
        "splits": f"{len(plan.grid)}: {', '.join(map(name_of, plan.grid))}",
        "memory_bytes": gigabytes(plan.memory_bytes),
        "seconds": f"about {seconds:.0f}, and timing",
    }
    show_plan(facts, words, output=output)


def _show_result(result: FrontierResult, output: OutputFormat) -> None:
    from factorctl.cli.render import show

    closing = [f"dropped: {point.name}, {point.dropped}" for point in result.points if point.dropped]
    if result.chosen is not None:
        chosen = result.chosen
        closing.append(
            f"chosen: {chosen.point}, decode {chosen.decode.median:.2f}x, prefill {chosen.prefill.median:.2f}x when "
            f"made and timed once more, {chosen.accuracy_kept:.1%} of the accuracy kept"
        )
        closing.append(f"Next: factorctl run {quote(str(chosen.recipe))}")
    else:
        closing.append("Next: the same command with a budget: --speed-up 1.3, --active 0.5 or --keep 0.9")
    closing += [f"written: {path}" for path in result.written]
    show(result, output=output, tables=_tables(result), closing=closing)


def _tables(result: FrontierResult) -> list[Table]:
    from factorctl.cli.render import facts_table, gigabytes, rows_table

    facts: dict[str, object] = {
        "dense": f"perplexity {result.dense_perplexity:.2f}, next-token accuracy {result.dense_accuracy:.1%}",
        "judged on": f"{result.heldout_tokens:,} tokens: {result.heldout_text}",
        "machine": f"{result.hardware.device}, {result.hardware.threads} threads, {result.hardware.dtype}, "
        f"load {result.hardware.load_1min:g}",
        "time": f"{result.seconds:.0f} s, {result.reused} of {len(result.points)} points from an earlier run",
    }
    measured = [point for point in result.points if point.measured]
    chosen = None if result.chosen is None else result.chosen.point
    quality = [_quality_row(point, chosen) for point in measured]
    costs = [
        [point.name, f"{point.ffn_gflops:.3g}", f"-{point.ffn_flops_reduction:.0%}", f"{point.total_gflops:.3g}",
         f"-{point.total_flops_reduction:.0%}", gigabytes(point.export_bytes), point.export_target,
         f"{sum(point.engines.values())} of {len(point.engines)}"]
        for point in result.points
    ]  # fmt: skip
    return [
        facts_table(f"Frontier of {result.source}", facts),
        rows_table(
            "What each split keeps and wins, before any training (accuracy and speed over dense)",
            ["split", "active", "perplexity", "accuracy", "prefill", "decode", ""],
            quality,
        ),
        rows_table(
            f"What it computes (GFLOPs of a prompt of {result.config['prompt']}), and its export",
            ["split", "FFN", "saved", "total", "saved", "export", "--to", "engines"],
            costs,
        ),
    ]


def _quality_row(point: Point, chosen: str | None) -> list[object]:
    mark = "dominated" if point.dominated_by else "front"
    return [
        point.name,
        f"{point.active_ffn_fraction:.0%}",
        point.perplexity,
        f"{point.kept('accuracy'):.1%}",
        f"{point.speed_up('prefill'):.2f}x",
        f"{point.speed_up('decode'):.2f}x",
        "chosen" if point.name == chosen else mark,
    ]
