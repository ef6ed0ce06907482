"""A profile as tables of words: the same in the terminal and on the page."""

from __future__ import annotations

from factorctl.profiling.report import LatencyRow, ProfileResult
from factorctl.reporting.tables import ReportTable, figure


def report_tables(result: ProfileResult) -> dict[str, ReportTable]:
    """By topic, in the order in which they are shown; tables without rows are left out."""
    tables = {
        "flops": flops_table(result),
        "sweep": sweep_table(result),
        "latency": latency_table(result),
        "anchors": anchors_table(result),
        "ffn": ffn_table(result),
        "load": load_table(result),
    }
    return {topic: table for topic, table in tables.items() if table.rows}


def flops_table(result: ProfileResult) -> ReportTable:
    counts = {"dense": result.flops.dense, "active": result.flops.model, "executed": result.flops.executed}
    parts = ["ffn", "shared_ffn", "router", "attention", "head", "total"]
    rows = [[name, *(figure(count[part] / 1e9) for part in parts)] for name, count in counts.items()]
    columns = ["", "FFN", "shared", "router", "attention", "head", "total"]
    note = f"{result.flops.note}. torch's FlopCounterMode differs by {result.flops.counter_difference:.4%}."
    return ReportTable(f"GFLOPs of a prompt of {result.flops.tokens} tokens", columns, rows, note)


def sweep_table(result: ProfileResult) -> ReportTable:
    rows = [
        [row.notation, figure(row.ffn_gflops), f"-{row.ffn_reduction:.1%}", figure(row.total_gflops),
         f"-{row.total_reduction:.1%}"]
        for row in result.sweep
    ]  # fmt: skip
    return ReportTable("GFLOPs by active experts", ["", "FFN", "saved", "total", "saved"], rows)


def latency_table(result: ProfileResult) -> ReportTable:
    """Model against dense; regimes in which it loses are marked."""
    rows = [
        [_regime(row), row.path, figure(row.dense_ms), figure(row.model_ms),
         f"{row.speedup.median:.2f}x [{row.speedup.low:.2f}, {row.speedup.high:.2f}]", f"{row.ceiling:.2f}x"]
        for row in result.latency
    ]  # fmt: skip
    return ReportTable(
        "Latency against the dense model in the same runtime (batch x prompt)",
        ["regime", "path", "dense ms", "model ms", "speed-up", "ceiling"],
        rows,
        "In the same process, interleaved; 95% bootstrap intervals. The ceiling is what the roofline allows.",
        frozenset(index for index, row in enumerate(result.latency) if row.loses),
    )


def anchors_table(result: ProfileResult) -> ReportTable:
    """The other figures of the same regimes: with those of `latency_table` no terminal would be wide enough."""
    rows = [
        [_regime(row), figure(row.spread["model"].p90), figure(row.narrow_ms), f"{row.floor_share.median:.0%}",
         figure(row.stock_ms), f"{row.tokens_per_second:.1f}", str(len(row.samples_ms["model"]))]
        for row in result.latency
    ]  # fmt: skip
    return ReportTable(
        "The same regimes: a dense model as wide as the active neurons, and transformers' own",
        ["regime", "p90 ms", "narrow ms", "of floor", "stock ms", "tokens/s", "samples"],
        rows,
        "Of floor: narrow over model; 100% when routing costs nothing.",
    )


def ffn_table(result: ProfileResult) -> ReportTable:
    rows = [
        [str(cost.tokens), cost.path, figure(cost.ffn_ms), figure(cost.dense_ms), f"{cost.routing_share:.1%}",
         f"{cost.experts_hit:.2f}", figure(cost.weight_mbytes), figure(cost.dense_weight_mbytes),
         f"{cost.executed_share:.0%}"]
        for cost in result.ffn_costs
    ]  # fmt: skip
    columns = ["tokens", "path", "ms", "dense ms", "routing", "hit", "MB read", "dense MB", "executed"]
    return ReportTable("Where the time of an FFN layer goes (experts hit, share of FLOPs executed)", columns, rows)


def load_table(result: ProfileResult) -> ReportTable:
    rows = [[str(load.layer), figure(load.cv), figure(load.max_share)] for load in result.expert_load]
    columns = ["layer", "coefficient of variation", "largest share of tokens"]
    return ReportTable("Expert load", columns, rows, f"Routing decided by {result.text}.")


def _regime(row: LatencyRow) -> str:
    return f"{row.phase}, {row.batch} x {row.tokens}"
