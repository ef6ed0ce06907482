"""The profile as one self-contained HTML page: no scripts, no links, plots inlined."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape

from factorctl.profiling.report import LatencyRow, ProfileResult

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
td, th { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left }
tr.loses td { color: #c0392b; font-weight: 600 }
img { max-width: 100% }
.remark { background: #fff3cd; padding: .5rem 1rem }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 12px }
"""


def html_page(result: ProfileResult, plots: Mapping[str, bytes]) -> str:
    """The whole report; numbers are those of the JSON, which it carries at its end without the raw samples."""
    title = f"{result.notation}: profile of {result.checkpoint}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(headline(result))}</p>",
        *(f'<p class="remark">{escape(remark)}</p>' for remark in result.remarks),
        "<h2>Latency</h2>",
        "<p>Against the dense model in the same runtime and process, interleaved; 95% bootstrap intervals. "
        "<em>Of floor</em> compares with a dense model as wide as the active neurons.</p>",
        _table(LATENCY_COLUMNS, [_latency_cells(row) for row in result.latency], [row.loses for row in result.latency]),
        _image(plots, "speedup"),
        "<h2>FLOPs</h2>",
        f"<p>{escape(result.flops.note)}. "
        f"torch's FlopCounterMode differs by {result.flops.counter_difference:.4%}.</p>",
        _flops_table(result),
        _image(plots, "flops"),
        "<h2>Where the time of an FFN goes</h2>",
        _costs_table(result),
        "<h2>Expert load</h2>",
        f"<p>Routing decided by {escape(result.text)}.</p>",
        _image(plots, "expert_load"),
        "<h2>Machine and versions</h2>",
        f"<pre>{escape(json.dumps(without_samples(result), indent=1, default=str))}</pre>",
    ]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def headline(result: ProfileResult) -> str:
    """FLOPs and latency on one line, the best and the worst regime."""
    line = f"FFN FLOPs -{result.ffn_flops_reduction:.0%}, model FLOPs -{result.total_flops_reduction:.0%}"
    if not result.latency:
        return line
    by_speedup = sorted(result.latency, key=lambda row: row.speedup.median)
    described = [f"{row.speedup.median:.2f}x of {row.ceiling:.2f}x ({describe(row)})" for row in by_speedup]
    return f"{line}; fastest {described[-1]}, slowest {described[0]}"


def describe(row: LatencyRow) -> str:
    return f"{row.phase}, batch {row.batch}, prompt {row.tokens}"


def without_samples(result: ProfileResult) -> dict[str, object]:
    """The report as JSON without raw samples."""
    content = asdict(result)
    for row in content["latency"]:
        del row["samples_ms"]
    return content


LATENCY_COLUMNS = (
    "regime", "path", "dense ms", "model ms", "speed-up", "ceiling", "of floor", "stock ms", "p90 ms", "tokens/s",
)  # fmt: skip


def _latency_cells(row: LatencyRow) -> list[str]:
    speedup = f"{row.speedup.median:.2f}x [{row.speedup.low:.2f}, {row.speedup.high:.2f}]"
    return [
        describe(row),
        row.path,
        f"{row.dense_ms:.2f}",
        f"{row.model_ms:.2f}",
        speedup,
        f"{row.ceiling:.2f}x",
        f"{row.floor_share.median:.0%}",
        f"{row.stock_ms:.2f}",
        f"{row.spread['model'].p90:.2f}",
        f"{row.tokens_per_second:.1f}",
    ]


def _flops_table(result: ProfileResult) -> str:
    columns = ["GFLOPs", "FFN", "of it shared", "router", "attention", "head", "total"]
    keys = ["ffn", "shared_ffn", "router", "attention", "head", "total"]
    counts = {"dense": result.flops.dense, "active": result.flops.model, "executed": result.flops.executed}
    rows = [[name, *(f"{count[key] / 1e9:.2f}" for key in keys)] for name, count in counts.items()]
    sweep = [
        [row.notation, f"{row.ffn_gflops:.2f}", f"-{row.ffn_reduction:.1%}", f"{row.total_gflops:.2f}",
         f"-{row.total_reduction:.1%}"]
        for row in result.sweep
    ]  # fmt: skip
    table = _table(columns, rows)
    return table + (_table(["", "FFN GFLOPs", "FFN", "total GFLOPs", "total"], sweep) if sweep else "")


def _costs_table(result: ProfileResult) -> str:
    columns = [
        "tokens",
        "path",
        "layer ms",
        "dense ms",
        "routing",
        "experts hit",
        "MB read",
        "dense MB",
        "executed FLOPs",
    ]
    rows = [
        [str(cost.tokens), cost.path, f"{cost.ffn_ms:.3f}", f"{cost.dense_ms:.3f}", f"{cost.routing_share:.1%}",
         f"{cost.experts_hit:.2f}", f"{cost.weight_mbytes:.2f}", f"{cost.dense_weight_mbytes:.2f}",
         f"{cost.executed_share:.0%}"]
        for cost in result.ffn_costs
    ]  # fmt: skip
    return _table(columns, rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], loses: Sequence[bool] = ()) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    marks = [' class="loses"' if lost else "" for lost in loses] or [""] * len(rows)
    lines = [
        f"<tr{mark}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row, mark in zip(rows, marks, strict=True)
    ]
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _image(plots: Mapping[str, bytes], name: str) -> str:
    if name not in plots:
        return ""
    return f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(plots[name]).decode()}">'
