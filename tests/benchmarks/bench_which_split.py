"""Which split: what each loses before and after a short training, beside how fast it measures.

    python tests/benchmarks/bench_which_split.py speeds --text train.jsonl.xz
    python tests/benchmarks/bench_routing.py run --plan tests/benchmarks/plans/which-split.toml --data DIR
    python tests/benchmarks/bench_which_split.py report --cells runs/bench-routing/cells.jsonl --hardware "one H100"

`speeds` factorizes every split of the plan on a little text, which decides what the experts are but not what they cost,
and profiles it beside the dense model on this machine; it goes on where it stopped. The 66 cells want a GPU. `report`
joins both by split.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from reporting import header, report_path, write_report
from routing_cells import DEMO_NEURONS, STATIC, Cell, read_plan
from routing_crew import read_results
from routing_report import Score, excess, paired

from factorctl.cli.render import progress_listener
from factorctl.config.factorize import FactorizeConfig
from factorctl.config.profile import ProfileConfig
from factorctl.config.shape import FactorShape
from factorctl.pipeline.factorize.run import factorize
from factorctl.pipeline.profile.run import profile
from factorctl.reporting.pictures import png

PLAN = Path(__file__).with_name("plans") / "which-split.toml"
PROMPT = 512
COLOURS = {75: "#2a9d8f", 50: "#c0392b", 25: "#8e44ad"}
"""By percent of the FFN's neurons that are active."""


@dataclass(frozen=True)
class Row:
    """One split of the table."""

    cell: Cell
    untrained: float
    """Excess over the dense model in nats per token, as is the next one."""
    trained: float | None
    ahead: str
    """Of static pruning trained alike, with its interval."""
    prefill: float | None
    """Times as fast as the dense model, as is the next one."""
    decode: float | None

    @property
    def routed(self) -> bool:
        return self.cell.method != STATIC

    @property
    def shape(self) -> FactorShape:
        return self.cell.shape(DEMO_NEURONS)

    @property
    def percent(self) -> int:
        return round(100 * self.shape.active_ffn_fraction)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--speeds", type=Path, default=Path("runs/which-split/speeds.jsonl"))
    commands = parser.add_subparsers(dest="command", required=True)
    speeds = commands.add_parser("speeds")
    speeds.add_argument("--model", default="demo")
    speeds.add_argument("--text", required=True)
    speeds.add_argument("--calibration-tokens", type=int, default=2048)
    speeds.add_argument("--rounds", type=int, default=8)
    report = commands.add_parser("report")
    report.add_argument("--cells", type=Path, required=True)
    report.add_argument("--hardware", required=True, help="where the cells were trained")
    report.add_argument("--out", type=Path, help="Markdown; its picture goes beside it")
    arguments = parser.parse_args()
    if arguments.command == "speeds":
        measure_speeds(arguments)
    else:
        write(arguments)
    return 0


def splits_of(plan: Path) -> list[Cell]:
    """Each split of the plan once, and each static control."""
    return list({(cell.split, cell.method): cell for cell in read_plan(plan)}.values())


def measure_speeds(arguments: argparse.Namespace) -> None:
    known = {record["name"] for record in read_results(arguments.speeds)}
    home = arguments.speeds.parent
    home.mkdir(parents=True, exist_ok=True)
    progress = progress_listener(quiet=True)
    for cell in splits_of(arguments.plan):
        if cell.name in known:
            continue
        made = factorize(
            FactorizeConfig(
                model=arguments.model,
                out=home / "split",
                overwrite=True,
                calibration=arguments.text,
                calibration_tokens=arguments.calibration_tokens,
                **cell.factorize_options(DEMO_NEURONS),
            ),
            progress,
        )
        found = profile(
            ProfileConfig(
                checkpoint=home / "split", batch=(1,), prompt=(PROMPT,), rounds=arguments.rounds, data=arguments.text
            ),
            progress,
        )
        record: dict[str, Any] = {"name": cell.name, "notation": made.notation, "busy": found.busy}
        record |= {row.phase: [row.speedup.median, row.speedup.low, row.speedup.high] for row in found.latency}
        with arguments.speeds.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)


def write(arguments: argparse.Namespace) -> None:
    rows = list(rows_of(arguments))
    out = arguments.out or report_path("which-split-demo")
    picture = out.with_suffix(".png")
    picture.write_bytes(draw(rows))
    text = header("Which split") + "\n".join(["", *report_lines(rows, arguments.hardware, picture.name), ""])
    write_report(out, text)


def rows_of(arguments: argparse.Namespace) -> Iterator[Row]:
    records = {record["name"]: record for record in read_results(arguments.cells)}
    speeds = {record["name"]: record for record in read_results(arguments.speeds)}
    dense = Score.of(records["dense/valid"])
    cells = {cell.name: cell for cell in read_plan(arguments.plan)}
    measured = [records[name] | {"of": cell} for name, cell in cells.items() if "documents" in records.get(name, {})]
    for cell in splits_of(arguments.plan):
        mine = [record for record in measured if (record["of"].split, record["of"].method) == (cell.split, cell.method)]
        untrained = next((record for record in mine if not record["of"].tokens), None)
        trained = next((record for record in mine if record["of"].tokens), None)
        if untrained is None:
            print(f"{cell.split} {cell.method} was not measured", file=sys.stderr)
            continue
        control = next(
            (r for r in measured if r["of"].method == STATIC and r["of"].tokens and r["active"] == untrained["active"]),
            None,
        )
        beside = trained is not None and control is not None and control is not trained
        speed = speeds.get(cell.name, {})
        yield Row(
            cell,
            excess(Score.of(untrained), dense),
            None if trained is None else excess(Score.of(trained), dense),
            paired(Score.of(trained), Score.of(control)) if beside and trained and control else "",
            speed.get("prefill", [None])[0],
            speed.get("decode", [None])[0],
        )


def report_lines(rows: Sequence[Row], hardware: str, picture: str) -> Iterator[str]:
    yield f"Quality measured on {hardware}, speed on the machine above: batch 1, prompt {PROMPT}, beside the dense"
    yield "model in the same process. Excess is ln(perplexity / dense perplexity) on valid text, before training"
    yield "and after 61,440 tokens. Bold: no split here is both better and faster, at prefill (P) or at decoding (D)."
    yield ""
    yield f"![Excess against speed]({picture})"
    for percent in sorted({row.percent for row in rows}, reverse=True):
        yield from ["", f"## {percent}% active", ""]
        yield "| split | excess, untrained | trained | ahead of static, trained alike | prefill | decode | front |"
        yield "|---|---:|---:|---:|---:|---:|---|"
        for row in (row for row in rows if row.percent == percent):
            best = "".join(
                letter for letter, phase in (("P", "prefill"), ("D", "decode")) if on_front(row, rows, phase)
            )
            name = f"**{title(row)}**" if best else title(row)
            yield (
                f"| {name} | {row.untrained:.3f} | {number(row.trained)} | {row.ahead} | {number(row.prefill, 2)} "
                f"| {number(row.decode, 2)} | {best} |"
            )


def title(row: Row) -> str:
    return row.shape.notation if row.routed else f"static ({row.shape.notation})"


def number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def on_front(row: Row, rows: Sequence[Row], phase: str) -> bool:
    """Whether no other trained split is at least as good and as fast, and better in one."""
    speed, loss = getattr(row, phase), row.trained
    if speed is None or loss is None:
        return False
    others = [(getattr(other, phase), other.trained) for other in rows if other is not row]
    return not any(
        fast is not None and lost is not None and fast >= speed and lost <= loss and (fast > speed or lost < loss)
        for fast, lost in others
    )


def draw(rows: Sequence[Row]) -> bytes:
    """Excess after training against measured speed: routed with shared neurons, without, and static."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, phase in zip(figure.subplots(1, 2, sharey=True), ("prefill", "decode"), strict=True):
        complete = [row for row in rows if row.trained is not None and getattr(row, phase) is not None]
        for row in complete:
            marker = "s" if not row.routed else "o" if row.shape.shared_size else "^"
            colour = COLOURS[min(COLOURS, key=lambda known: abs(known - row.percent))]
            face = colour if on_front(row, rows, phase) else "white"
            axes.scatter(getattr(row, phase), row.trained, marker=marker, facecolors=face, edgecolors=colour, zorder=2)
            if row.routed:
                place = (getattr(row, phase), row.trained)
                axes.annotate(
                    str(row.shape.num_experts), place, (4, 3), textcoords="offset points", fontsize=7, color=colour
                )
        front = sorted((getattr(row, phase), row.trained) for row in complete if on_front(row, rows, phase))
        axes.plot([x for x, _ in front], [y for _, y in front], color="#555555", linewidth=1, zorder=1)
        axes.set(xlabel=f"{phase}: times as fast as the dense model")
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="ln(perplexity / dense perplexity), after 61,440 tokens")
    for marker, label in (("o", "routed, shared neurons"), ("^", "routed, nothing shared"), ("s", "static pruning")):
        figure.axes[0].scatter([], [], marker=marker, facecolors="white", edgecolors="black", label=label)
    for percent, colour in COLOURS.items():
        figure.axes[0].scatter([], [], marker="o", color=colour, label=f"{percent}% active")
    figure.axes[0].legend(fontsize="small", title="numbers: experts; filled: on the front", title_fontsize="small")
    return png(figure)


if __name__ == "__main__":
    sys.exit(main())
