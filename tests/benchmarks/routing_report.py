"""The report of the routing benchmark, from the records of its cells."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reporting import header
from routing_cells import SPLITS, STATIC, shown

from factorctl.reporting.statistics import ratio_interval

Record = Mapping[str, Any]


def report_text(records: Sequence[Record]) -> str:
    return header("Routing against static pruning") + "\n".join(["", *report_lines(records), ""])


def report_lines(records: Sequence[Record]) -> Iterator[str]:
    measured = [record for record in records if "documents" in record]
    dense = {record["text"]: Score.of(record) for record in measured if record["name"].startswith("dense/")}
    cells = [record for record in measured if "cell" in record]
    for text, score in dense.items():
        yield (
            f"`{text}`: {score.tokens:,} tokens of {len(score.documents)} documents, dense perplexity "
            f"{score.perplexity:.2f}."
        )
    yield ""
    yield "Excess is ln(perplexity / perplexity of the dense model), smaller is better; the perplexity stands behind"
    yield "it. Ahead is how much smaller it is than that of static pruning with as many active neurons and the same"
    yield "training, with its 95% interval, paired over documents."
    plain = [record for record in cells if record["cell"]["text"] == "valid"]
    if "valid" in dense and plain:
        yield from table(plain, dense["valid"])
        yield from curves(plain)
        yield from tasks(plain)
    chosen = [record for record in cells if record["cell"]["text"] == "select"]
    if "select" in dense and chosen:
        yield from ["", "## Options, on the selection text", ""]
        yield from options_table(chosen, dense["select"])
    failed = [record for record in records if "error" in record]
    if failed:
        yield from ["", "## Failed", ""]
        yield from (f"- {record['name']}: {record['error'].splitlines()[0][:120]}" for record in failed)


@dataclass(frozen=True)
class Score:
    """[nats, tokens] of every document."""

    documents: Sequence[tuple[float, int]]

    @classmethod
    def of(cls, record: Record) -> Score:
        return cls([(nats, tokens) for nats, tokens in record["documents"]])

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.documents)

    @property
    def mean_nats(self) -> float:
        return math.fsum(nats for nats, _ in self.documents) / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.mean_nats, 700.0))


def excess(score: Score, dense: Score) -> float:
    return score.mean_nats - dense.mean_nats


def paired(ours: Score, other: Score) -> str:
    """other - ours in nats per token, with its interval: positive is ahead."""
    pairs = zip(ours.documents, other.documents, strict=True)
    differences = [theirs - mine for (mine, _), (theirs, _) in pairs]
    interval = ratio_interval(differences, [float(tokens) for _, tokens in ours.documents], seed=0)
    beside = "" if interval is None else f" [{interval[0]:+.3f}, {interval[1]:+.3f}]"
    return f"{other.mean_nats - ours.mean_nats:+.3f}{beside}"


def control_of(record: Record, cells: Sequence[Record]) -> Record | None:
    """The static cell with as many active neurons, trained on as many tokens: with the same options, else the best."""
    cell = record["cell"]
    alike = [
        other
        for other in cells
        if other["cell"]["method"] == STATIC
        and other["active"] == record["active"]
        and all(other["cell"][key] == cell[key] for key in ("tokens", "seed", "text"))
    ]
    return min(alike, key=lambda o: (o["cell"]["finetune"] != cell["finetune"], Score.of(o).mean_nats), default=None)


def table(cells: Sequence[Record], dense: Score) -> Iterator[str]:
    yield from ["", "## Excess at equal active neurons", ""]
    yield "| split | active | tokens trained | method | options | excess | perplexity | ahead of static |"
    yield "|---|---:|---:|---|---|---:|---:|---:|"
    for record in sorted(cells, key=by_split):
        cell, score = record["cell"], Score.of(record)
        control = control_of(record, cells)
        ahead = "" if control is None or control is record else paired(score, Score.of(control))
        yield (
            f"| {record['notation']} | {record['active'] / record['neurons']:.0%} | {tokens_of(record):,} "
            f"| {cell['method']} | {options(cell)} | {excess(score, dense):.3f} | {score.perplexity:.1f} | {ahead} |"
        )


def by_split(record: Record) -> tuple[int, int]:
    return list(SPLITS).index(record["cell"]["split"]), record["cell"]["tokens"]


def tokens_of(record: Record) -> int:
    """What it was trained on, which is whole steps, and fewer than asked for where the time was short."""
    return int(record["finetune"]["tokens"]) if "finetune" in record else 0


def options(cell: Mapping[str, Any]) -> str:
    words = [f"{key}={shown(value)}" for part in ("factorize", "finetune") for key, value in cell[part].items()]
    return " ".join([*words, *([f"seed={cell['seed']}"] if cell["seed"] else [])])


def options_table(cells: Sequence[Record], dense: Score) -> Iterator[str]:
    yield "| split | tokens | method | options | nats | excess | agreement | PAR, held out (chance) | tokens/s |"
    yield "|---|---:|---|---|---:|---:|---:|---:|---:|"
    ranked = sorted(
        cells,
        key=lambda r: (*by_split(r), r["cell"]["method"], Score.of(r).mean_nats),
    )
    for record in ranked:
        cell, found = record["cell"], record.get("finetune") or {}
        before, after = found.get("router_agreement_before"), found.get("router_agreement")
        agreement = "" if after is None else f"{before:.3f} to {after:.3f}"
        par = "" if after is None else f"{found['losses_before']['par']:.3f} to {found['losses']['par']:.3f}"
        if after is not None:
            par += f" ({found['par_of_chance']:.2f})"
        speed = found.get("tokens_per_second")
        yield (
            f"| {cell['split']} | {tokens_of(record):,} | {cell['method']} | {options(cell)} "
            f"| {Score.of(record).mean_nats:.3f} | {excess(Score.of(record), dense):.3f} | {agreement} | {par} "
            f"| {'' if speed is None else f'{speed:.0f}'} |"
        )


def curves(cells: Sequence[Record]) -> Iterator[str]:
    drawn = [record for record in cells if record.get("curve")]
    if not drawn:
        return
    yield from ["", "## Perplexity on the way", ""]
    yield "While training, on the first documents of the same text: tokens and perplexity."
    yield ""
    for record in drawn:
        points = ", ".join(f"{tokens:,}: {math.exp(min(nats, 700)):.1f}" for tokens, nats in record["curve"])
        yield f"- {record['cell']['split']} {record['cell']['method']} {options(record['cell'])}: {points}"


def tasks(cells: Sequence[Record]) -> Iterator[str]:
    scored = [record for record in cells if record.get("tasks")]
    if not scored:
        return
    yield from ["", "## Tasks, in full", ""]
    yield "Accuracy beside the dense model's; kept is the ratio, kept above chance that of what exceeds chance."
    yield ""
    yield "| method | task | n | accuracy | dense | difference +- stderr | p | kept | kept above chance |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|"
    for record in scored:
        name = f"{record['cell']['split']} {record['cell']['method']}"
        for task, row in record["tasks"]["tasks"].items():
            yield (
                f"| {name} | {task} | {row['n']} | {row['model']:.3f} | {row['dense']:.3f} "
                f"| {row['model'] - row['dense']:+.3f} +- {number(row['stderr_diff'])} | {number(row['p_value'])} "
                f"| {number(row['kept'])} | {number(row['kept_above_chance'])} |"
            )
        average = record["tasks"]["average"]
        yield f"| {name} | average | | | | | | {number(average['kept'])} | {number(average['kept_above_chance'])} |"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
