"""`factorctl run` and `factorctl demo`: several stages with one command."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from factorctl.cli.options import FormatOpt, OutputFormat, QuietOpt, WorkspaceOpt
from factorctl.config.common import DEFAULT_WORKSPACE

if TYPE_CHECKING:
    from factorctl.pipeline.recipe.demo import DemoResult
    from factorctl.pipeline.recipe.run import RunResult


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file with a table for each stage.")],
    workspace: WorkspaceOpt = DEFAULT_WORKSPACE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say which stages would run; run none.")] = False,
    output: FormatOpt = "text",
    quiet: QuietOpt = False,
) -> None:
    """Run the stages of a recipe, redoing only what changed since the last time.

    Tables are named as the commands, keys as their options. Options, source, text, versions and the stage before decide
    whether a stage runs again.

    Examples:

        factorctl run recipe.toml --dry-run
    """
    from factorctl.cli.render import progress_listener
    from factorctl.pipeline.recipe.read import read_recipe
    from factorctl.pipeline.recipe.run import run_recipe

    _show_run(run_recipe(read_recipe(recipe), workspace, progress_listener(quiet=quiet), dry_run=dry_run), output)


def demo(
    workspace: WorkspaceOpt = DEFAULT_WORKSPACE,
    output: FormatOpt = "text",
    quiet: QuietOpt = False,
) -> None:
    """Factorize, finetune, evaluate, profile and export a small real model, and tell what happened.

    Takes some minutes on two cores. What an earlier run finished is reused.
    """
    from factorctl.cli.render import progress_listener
    from factorctl.pipeline.recipe.demo import run_demo

    _show_demo(run_demo(workspace, progress_listener(quiet=quiet)), output)


def _show_run(result: RunResult, output: OutputFormat) -> None:
    from factorctl.cli.render import rows_table, show

    rows = [[outcome.stage, outcome.status, f"{outcome.seconds:.0f} s", outcome.output] for outcome in result.stages]
    table = rows_table(f"Recipe {result.name}", ["stage", "status", "time", "result"], rows)
    show(result, output=output, tables=[table])


def _show_demo(result: DemoResult, output: OutputFormat) -> None:
    from factorctl.cli.render import facts_table, gigabytes, rows_table, show

    facts: dict[str, object] = {
        "split": f"{result.notation}: {result.active_ffn_fraction:.0%} of the FFN works for a token",
        "exact before the refit": f"all experts on are the dense model, to {result.identity_error:.0e}",
        "FFN FLOPs": f"-{result.ffn_flops_reduction:.0%}",
        "total FLOPs": f"-{result.total_flops_reduction:.0%}",
    }
    for speed in result.speedups:
        regime = f"{speed.phase}, batch {speed.batch}, {speed.tokens} tokens"
        busy = ", on a busy machine" if result.busy else ""
        facts[regime] = f"{speed.median:.2f}x [{speed.low:.2f}, {speed.high:.2f}] of {speed.ceiling:.2f}x{busy}"
    facts |= {
        "perplexity": f"{result.perplexity_dense:.1f} dense, {result.perplexity_before:.1f} factorized, "
        f"{result.perplexity_after:.1f} after {result.trained_tokens:,} tokens of training",
        "next-token accuracy kept": f"{result.accuracy_kept:.0%}",
    }
    for name, made in result.exports.items():
        facts[name] = f"{gigabytes(made['bytes'])}, {made['top1_agreement']:.1%} top-1 agreement in {made['engine']}"
    places = {
        "checkpoint": result.checkpoint,
        **{name: made["path"] for name, made in result.exports.items()},
        "report": result.html,
        "pictures": "\n".join(result.pictures),
    }
    stages = [[outcome.stage, outcome.status, f"{outcome.seconds:.0f} s"] for outcome in result.stages]
    samples = {"prompt": result.sample.prompt, "dense": result.sample.dense, result.notation: result.sample.model}
    tables = [
        rows_table(f"Stages, {result.seconds:.0f} s in all", ["stage", "status", "time"], stages),
        facts_table("SmolLM2-135M-Instruct, factored, on Python's own manual", facts),
        facts_table("Where it is", places),
        facts_table("The same prompt", samples),
    ]
    closing = [
        "A minute of training recovers a part; quality grows with tokens: factorctl finetune --tokens 40M",
        f"Next: factorctl eval {quote(result.checkpoint)} --controls --data YOUR_TEXT",
    ]
    show(result, output=output, tables=tables, closing=closing)
