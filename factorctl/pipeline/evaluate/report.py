"""An evaluation as tables of words, for the terminal and for a model card."""

from __future__ import annotations

from collections.abc import Sequence

from factorctl.evaluation.fidelity import LayerFidelity
from factorctl.pipeline.evaluate.result import EvalResult, MethodRow
from factorctl.reporting.tables import ReportTable


def report_tables(result: EvalResult) -> list[ReportTable]:
    """Methods first, then the figures behind them; tables without rows are left out."""
    tables = [
        methods_table(result),
        perplexity_table(result),
        domains_table(result),
        domain_methods_table(result),
        tasks_table(result),
        differences_table(result),
        fidelity_table(result.fidelity),
    ]
    return [table for table in tables if table.rows]


def methods_table(result: EvalResult) -> ReportTable:
    """One line per method, all at the same active FFN neurons but for `dense` and `all experts on`."""
    texts, scored = list(result.perplexity), bool(result.tasks)
    perplexities = ["perplexity"] if len(texts) == 1 else [f"perplexity, {text}" for text in texts]
    columns = ["method", "active FFN", *perplexities]
    if scored:
        columns += ["task average", "kept", "kept above chance"]
    return ReportTable(
        f"{result.notation or result.checkpoint} against {result.source}",
        columns,
        [_method(row, texts, scored=scored) for row in result.methods()],
        "Kept (retention): score over the dense model's, mean over tasks. Above chance: the same, with what guessing "
        "gives taken off both."
        if scored
        else "",
    )


def _method(row: MethodRow, texts: Sequence[str], *, scored: bool) -> list[str]:
    cells = [row.title, percent(row.active_ffn_fraction), *(number(row.perplexity.get(text)) for text in texts)]
    return [*cells, percent(row.task_average), percent(row.kept), percent(row.kept_above_chance)] if scored else cells


def perplexity_table(result: EvalResult) -> ReportTable:
    rows = [
        [
            name,
            f"{found.dense:.2f}{interval(found.dense_ci)}",
            f"{found.model:.2f}{interval(found.ci)}",
            f"{found.log_difference:+.3f}{interval(found.log_difference_ci, digits=3)}",
            percent(found.accuracy_kept),
        ]
        for name, found in result.perplexity.items()
    ]
    notes = [
        f"{name}: {found.tokens:,} tokens in {found.documents:,} documents, windows of {found.window}, stride "
        f"{found.stride}."
        for name, found in result.perplexity.items()
    ]
    notes.append("95% intervals from a bootstrap over documents; the difference is paired, in nats per token.")
    notes.append("Top-1 retention: next tokens predicted right (top-1 accuracy), over the dense model's.")
    return ReportTable(
        "Perplexity", ["text", "dense", "model", "ln difference", "top-1 retention"], rows, " ".join(notes)
    )


def domains_table(result: EvalResult) -> ReportTable:
    several = len(result.domains) > 1
    rows = [
        [
            f"{text}, {domain}" if several else domain,
            f"{found.tokens:,}",
            f"{found.dense:.2f}",
            f"{found.model:.2f}{interval(found.ci)}",
            f"{found.log_difference:+.3f}{interval(found.log_difference_ci, digits=3)}",
            percent(found.accuracy_kept),
        ]
        for text, domains in result.domains.items()
        for domain, found in domains.items()
    ]
    columns = ["domain", "tokens", "dense", "model", "ln difference", "top-1 retention"]
    return ReportTable("Perplexity by domain", columns, rows, "As above, for the documents of each domain alone.")


def domain_methods_table(result: EvalResult) -> ReportTable:
    """One line per method where there are controls; else `domains_table` has said it all."""
    columns = [(text, domain) for text, domains in result.domains.items() for domain in domains]
    several = len(result.domains) > 1
    rows = [
        [row.title, *(number(row.domains[text][domain]) for text, domain in columns)]
        for row in result.methods()
        if columns and result.controls
    ]
    names = [f"{text}, {domain}" if several else domain for text, domain in columns]
    return ReportTable("Perplexity by method and domain", ["method", *names], rows)


def tasks_table(result: EvalResult) -> ReportTable:
    rows = [
        [
            f"{name} ({found['few_shot']}-shot)",
            found["metric"],
            f"{found['n']:,}",
            percent(found["chance"]),
            percent(found["majority"]),
            percent(found["dense"]),
            percent(found["model"]),
        ]
        for name, found in result.tasks.items()
    ]
    columns = ["task", "metric", "n", "chance", "majority", "dense", "model"]
    note = "Chance is blind guessing, majority always the most frequent answer."
    return ReportTable("Tasks", columns, rows, note)


def differences_table(result: EvalResult) -> ReportTable:
    rows = [
        [
            name,
            f"{100 * (found['model'] - found['dense']):+.1f} ± {100 * found['stderr_diff']:.1f}",
            f"{found['wins']} / {found['losses']}",
            f"{found['p_value']:.2g}",
            percent(found["kept"]),
            percent(found["kept_above_chance"]),
        ]
        for name, found in result.tasks.items()
    ]
    columns = ["task", "difference", "won / lost", "p", "kept", "kept above chance"]
    reasons = [f"{name}: {why}." for name, found in result.tasks.items() if (why := found.get("why_not_kept"))]
    note = "Percentage points with their standard error, paired by document; p is McNemar's exact test."
    return ReportTable("Tasks, model against dense", columns, rows, " ".join([note, *reasons]))


def fidelity_table(layers: Sequence[LayerFidelity]) -> ReportTable:
    rows = [
        [
            str(layer.layer),
            f"{layer.relative_error:.3f}",
            f"{layer.median_error:.3f}",
            percent(layer.agreement),
            number(max(layer.load) if layer.load else None),
            number(layer.load_entropy, 3),
            number(layer.router_entropy, 3),
            ", ".join(map(str, layer.dead_experts)) or "none",
        ]
        for layer in layers
    ]
    columns = ["layer", "error", "median", "agreement", "largest load", "load entropy", "router entropy", "dead"]
    note = (
        "Each factored FFN against its dense one on the model's own stream; agreement with the teacher's labels; "
        "entropies over that of an even spread."
    )
    return ReportTable("Layer fidelity", columns, rows, note)


def markdown(result: EvalResult) -> str:
    """The report as a section of a model card."""
    parts = ["## Evaluation", *(markdown_table(table) for table in report_tables(result))]
    if references := _references(result):
        parts.append(references)
    parts += [*(f"- {remark[0].upper()}{remark[1:]}." for remark in result.remarks), _circumstances(result)]
    return "\n\n".join(parts) + "\n"


def _references(result: EvalResult) -> str:
    return "; ".join(f"{row.title}: <{row.reference}>" for row in result.controls.values() if row.reference)


def _circumstances(result: EvalResult) -> str:
    """What is needed to get these figures again."""
    hardware, config = result.hardware, result.config
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    limit = "all documents" if config["limit"] is None else f"the first {config['limit']} documents of each task"
    lines = [
        "### How it was measured",
        "",
        f"- Model `{result.checkpoint}`"
        + (f", manifest `{result.manifest_sha256[:16]}`" if result.manifest_sha256 else "")
        + f"; compared with `{result.source}` in the same run, with the same prompts, in {hardware.dtype}.",
        *([f"- Tasks through lm-eval, {limit}."] if result.tasks else []),
        f"- {hardware.device}, {hardware.threads} threads; seed {result.seed}; {versions}.",
    ]
    command = f"\n\n```sh\n{result.command}\n```" if result.command else ""
    return "\n".join(lines) + command


def markdown_table(table: ReportTable) -> str:
    """The table under its title, its note behind it."""
    lines = [f"### {table.title}", "", _line(table.columns), _line(["---", *["---:"] * (len(table.columns) - 1)])]
    lines += [_line(row) for row in table.rows]
    return "\n".join([*lines, *(["", table.note] if table.note else [])])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def interval(ends: tuple[float, float] | None, digits: int = 2) -> str:
    return "" if ends is None else f" [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"
