"""Which write points of a run are tried: all of them with --every-fault, by default a sample that takes minutes."""

from __future__ import annotations

from collections.abc import Sequence

from comparing import LOCK_NAME

PIECES = {"factorize": 13, "factorize, calibrated": 31, "finetune": 53, "frontier": 60, "export gguf": 7, "run": 400}
CALLS = {
    "factorize": 3,
    "factorize, calibrated": 8,
    "finetune": 12,
    "export gguf": 3,
    "export bnb-4bit": 16,
    "eval": 14,
    "profile": 10,
    "frontier": 30,
    "run": 150,
}
"""By default every n-th piece of a file and every n-th other call."""
MOMENTS = {"finetune": 6, "eval": 4, "profile": 5, "frontier": 3, "export bnb-4bit": 4, "run": 4, "demo": 4}
"""How many moments of a run signals are sent at by default; 8 where nothing is said."""
OWN = {"run": LOCK_NAME}
"""Of a verb that calls others, the file that is its own."""
OWN_EVERY, OTHERS_EVERY = 13, 20
"""Of its points every n-th by default; of the others', which have rows of their own, every n-th with --every-fault."""


def tried(points: Sequence[str], name: str, every_fault: bool, times: int = 1) -> list[int]:
    """Numbers of the points to kill or refuse at; `times` thins the sample out."""
    if every_fault:
        return all_points(points, name)
    sample = sampled(points, pieces=times * PIECES.get(name, 25), calls=times * CALLS.get(name, 6))
    return sorted({*sample, *_own(points, name)[:: times * OWN_EVERY]})


def moments(points: Sequence[str], name: str, every_fault: bool) -> list[int]:
    """Numbers of the points to send a signal at, evenly spread from the first to the last."""
    if every_fault:
        return all_points(points, name)
    wanted = MOMENTS.get(name, 8)
    return sorted({round(part * (len(points) - 1) / (wanted - 1)) for part in range(wanted)})


def all_points(points: Sequence[str], name: str) -> list[int]:
    """Every point that a verb adds."""
    if name not in OWN:
        return list(range(len(points)))
    return sorted({*range(0, len(points), OTHERS_EVERY), *_own(points, name)})


def _own(points: Sequence[str], name: str) -> list[int]:
    return [number for number, point in enumerate(points) if name in OWN and OWN[name] in point]


def sampled(points: Sequence[str], *, pieces: int, calls: int = 1) -> list[int]:
    """Every `calls`-th system call, every `pieces`-th piece of a file."""
    numbered = list(enumerate(points))
    writes = [number for number, name in numbered if name.startswith("write ")]
    others = [number for number, name in numbered if not name.startswith("write ")]
    return sorted([*writes[::pieces], *others[::calls]])
