"""A table of a report: made once, drawn by the terminal, by HTML pages and by model cards."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReportTable:
    """A titled table whose cells are ready to be shown."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    """What a reader must know to read it."""
    marked: frozenset[int] = frozenset()
    """Rows that are drawn in red."""


def figure(value: float) -> str:
    """Three or four digits that count, and no powers of ten for what is large."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
