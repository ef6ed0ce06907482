"""`factorctl profile`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from factorctl.cli.command import Asked
from factorctl.config.profile import ProfileConfig

if TYPE_CHECKING:
    from factorctl.cli.render import Table
    from factorctl.profiling.report import ProfileResult


def profile(config: ProfileConfig, asked: Asked) -> None:
    """Count FLOPs, time prefill and decoding against the dense model, and say where the time goes.

    The dense model runs in the same process and runtime, interleaved. Regimes in which the factored model loses are
    shown in red.

    Examples:

        factorctl profile runs/demo-1R4E2K --batch 1,8 --prompt 128,512 --html report.html

        factorctl profile --no-latency --sweep-k
    """
    from factorctl.cli.render import progress_listener, show
    from factorctl.pipeline.profile.run import profile as run_profile

    result = run_profile(config, progress_listener(quiet=asked.quiet))
    closing = [*result.remarks, *(f"written: {path}" for path in result.written)]
    show(result, output=asked.output, tables=_tables(result), closing=closing)


def _tables(result: ProfileResult) -> list[Table]:
    from factorctl.cli.render import facts_table, gigabytes

    facts: dict[str, object] = {
        "model": f"{result.notation}, {result.hardware.dtype} on {result.hardware.device}",
        "FLOPs": f"FFN -{result.ffn_flops_reduction:.1%}, model -{result.total_flops_reduction:.1%} "
        f"(prompt of {result.flops.tokens}; {result.flops.note})",
        "routing decided by": result.text,
        "weights": f"{gigabytes(result.weight_bytes)}, as many as the dense model's",
        "peak memory": gigabytes(result.peak_rss_bytes),
        "machine": f"{result.machine.gemm_gflops:.0f} GFLOP/s, {result.machine.bandwidth_gb_s:.1f} GB/s, "
        f"{result.hardware.threads} threads, load {result.hardware.load_1min:g}",
    }
    tables = [facts_table(f"Profile of {result.checkpoint}", facts), _flops_table(result)]
    if result.sweep:
        tables.append(_sweep_table(result))
    if result.latency:
        tables += [*_latency_tables(result), _costs_table(result)]
    if result.expert_load:
        tables.append(_load_table(result))
    if result.tuning:
        steps = ", ".join(f"{path} up to {limit or 'any'} tokens" for limit, path in result.tuning.steps)
        tables.append(facts_table("Tuned", {"site": result.tuning.site, "steps": steps}))
    return tables


def _flops_table(result: ProfileResult) -> Table:
    from factorctl.cli.render import rows_table

    counts = {"dense": result.flops.dense, "active": result.flops.model, "executed": result.flops.executed}
    parts = ["ffn", "shared_ffn", "router", "attention", "head", "total"]
    rows = [[name, *(f"{count[part] / 1e9:.3g}" for part in parts)] for name, count in counts.items()]
    columns = ["", "FFN", "shared", "router", "attention", "head", "total"]
    return rows_table(f"GFLOPs of a prompt of {result.flops.tokens} tokens", columns, rows)


def _sweep_table(result: ProfileResult) -> Table:
    from factorctl.cli.render import rows_table

    rows = [
        [row.notation, row.ffn_gflops, f"-{row.ffn_reduction:.1%}", row.total_gflops, f"-{row.total_reduction:.1%}"]
        for row in result.sweep
    ]
    return rows_table("GFLOPs by active experts", ["", "FFN", "saved", "total", "saved"], rows)


def _latency_tables(result: ProfileResult) -> list[Table]:
    """Model against dense, and the other figures of the same regimes: two tables that a terminal is wide enough for."""
    from factorctl.cli.render import rows_table

    regimes = [f"{row.phase}, {row.batch} x {row.tokens}" for row in result.latency]
    compared = [
        [regime, row.path, row.dense_ms, row.model_ms,
         f"{row.speedup.median:.2f}x [{row.speedup.low:.2f}, {row.speedup.high:.2f}]", f"{row.ceiling:.2f}x"]
        for regime, row in zip(regimes, result.latency, strict=True)
    ]  # fmt: skip
    others = [
        [regime, row.spread["model"].p90, row.narrow_ms, f"{row.floor_share.median:.0%}", row.stock_ms,
         f"{row.tokens_per_second:.1f}", len(row.samples_ms["model"])]
        for regime, row in zip(regimes, result.latency, strict=True)
    ]  # fmt: skip
    tables = [
        rows_table(
            "Latency against the dense model in the same runtime (batch x prompt)",
            ["regime", "path", "dense ms", "model ms", "speed-up", "ceiling"],
            compared,
        ),
        rows_table(
            "The same regimes: a dense model as wide as the active neurons, and transformers' own",
            ["regime", "p90 ms", "narrow ms", "of floor", "stock ms", "tokens/s", "samples"],
            others,
        ),
    ]
    for drawn, row in zip(tables[0].rows, result.latency, strict=True):
        drawn.style = "red" if row.loses else None
    return tables


def _costs_table(result: ProfileResult) -> Table:
    from factorctl.cli.render import rows_table

    columns = ["tokens", "path", "ms", "dense ms", "routing", "hit", "MB read", "dense MB", "executed"]
    rows = [
        [cost.tokens, cost.path, f"{cost.ffn_ms:.3g}", f"{cost.dense_ms:.3g}", f"{cost.routing_share:.1%}",
         f"{cost.experts_hit:.2f}", f"{cost.weight_mbytes:.3g}", f"{cost.dense_weight_mbytes:.3g}",
         f"{cost.executed_share:.0%}"]
        for cost in result.ffn_costs
    ]  # fmt: skip
    title = "Where the time of an FFN layer goes (experts hit, share of FLOPs executed)"
    return rows_table(title, columns, rows)


def _load_table(result: ProfileResult) -> Table:
    from factorctl.cli.render import rows_table

    rows = [[load.layer, load.cv, load.max_share] for load in result.expert_load]
    return rows_table("Expert load", ["layer", "coefficient of variation", "largest share of tokens"], rows)
