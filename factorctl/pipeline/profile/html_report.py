"""The profile as one self-contained HTML page: no scripts, no links, plots inlined."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict
from html import escape

from factorctl.pipeline.profile.report import report_tables
from factorctl.profiling.report import LatencyRow, ProfileResult
from factorctl.reporting.tables import ReportTable

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


MARK = ' class="loses"'
PICTURES = {"latency": "speedup", "flops": "flops", "load": "expert_load"}
"""Topic of a table -> the plot below it."""


def html_page(result: ProfileResult, plots: Mapping[str, bytes]) -> str:
    """The whole report; numbers are those of the JSON, which it carries at its end without the raw samples."""
    title = f"{result.notation}: profile of {result.checkpoint}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(headline(result))}</p>",
        *(f'<p class="remark">{escape(remark)}</p>' for remark in result.remarks),
        *(_section(table, plots.get(PICTURES.get(topic, ""))) for topic, table in report_tables(result).items()),
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


def _section(table: ReportTable, picture: bytes | None) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    lines = [
        f"<tr{MARK if index in table.marked else ''}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for index, row in enumerate(table.rows)
    ]
    parts = [f"<h2>{escape(table.title)}</h2>", f"<table><tr>{head}</tr>{''.join(lines)}</table>"]
    if table.note:
        parts.insert(1, f"<p>{escape(table.note)}</p>")
    if picture is not None:
        encoded = base64.b64encode(picture).decode()
        parts.append(f'<img alt="{escape(table.title)}" src="data:image/png;base64,{encoded}">')
    return "\n".join(parts)
