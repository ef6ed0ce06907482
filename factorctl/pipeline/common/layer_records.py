"""What `factorize` recorded of the layers, read back from a manifest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def recorded_load(records: Sequence[Any]) -> list[list[float]]:
    """Share of the calibration tokens that chose each expert, by layer; empty where none was recorded."""
    rows = [record.get("expert_load") if isinstance(record, dict) else None for record in records]
    known = [row for row in rows if isinstance(row, list) and row and all(isinstance(share, float) for share in row)]
    return known if len(known) == len(rows) else []
