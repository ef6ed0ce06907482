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
    from factorctl.cli.render import facts_table, gigabytes, report_table
    from factorctl.pipeline.profile.report import report_tables

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
    tables = [facts_table(f"Profile of {result.checkpoint}", facts), *map(report_table, report_tables(result).values())]
    if result.tuning:
        steps = ", ".join(f"{path} up to {limit or 'any'} tokens" for limit, path in result.tuning.steps)
        tables.append(facts_table("Tuned", {"site": result.tuning.site, "steps": steps}))
    return tables
