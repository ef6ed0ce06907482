"""Counts of tokens and bytes, and times, as people write them: 64K, 40M, 1.5B; 500MB, 2GB; 90s, 10m."""

from __future__ import annotations

import re
from decimal import Decimal

from factorctl.errors import UsageError

_TOKENS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SECONDS = {"": 1, "S": 1, "M": 60, "H": 3600}


def parse_token_count(text: str, option: str = "--tokens") -> int:
    """The number that `text` means: K, M and B are decimal (64K = 64,000; write 65536 for 2^16).

    >>> parse_token_count("1.5M")
    1500000

    Raises:
        UsageError: for anything that is not a whole number of tokens above 0, naming `option`.
    """
    hint = "write a whole number, or one with K (thousand), M (million) or B (billion): 65536, 64K, 40M, 1.5B"
    count = _parsed(text, r"([KMB]?)", _TOKENS)
    if count is None:
        raise UsageError(f"{option} '{text}' is not a number of tokens", hint)
    if count <= 0 or count != int(count):
        raise UsageError(f"{option} '{text}' must be a whole number of tokens above 0", hint)
    return int(count)


def parse_byte_count(text: str, option: str) -> int:
    """'500MB' as 500,000,000.

    Raises:
        UsageError: no such size, naming `option`.
    """
    size = _parsed(text, r"\s*([KMGT]?)B?", _BYTES)
    if size is None or round(size) <= 0:
        raise UsageError(f"{option} {text!r} is no size", "for example 500MB or 2GB")
    return round(size)


def parse_duration(text: str, option: str = "--time") -> float:
    """The seconds that `text` means: 90, 90s, 10m or 1.5h.

    >>> parse_duration("1.5h")
    5400.0

    Raises:
        UsageError: for anything that is not a time above 0, naming `option`.
    """
    seconds = _parsed(text, r"([SMH]?)", _SECONDS)
    if not seconds:
        raise UsageError(f"{option} '{text}' is no time", "write for example 90s, 10m or 1.5h")
    return float(seconds)


def show_token_count(count: int) -> str:
    """The shortest text that `parse_token_count` reads as `count`: 64K, 65536."""
    return _shown(count, _TOKENS)


def show_byte_count(size: int) -> str:
    """The shortest text that `parse_byte_count` reads as `size`: 500MB, 2GB."""
    return _shown(size, _BYTES, unit="B")


def _parsed(text: str, suffix: str, factors: dict[str, int]) -> Decimal | None:
    found = re.fullmatch(rf"(\d+(?:\.\d+)?){suffix}", text.strip().replace(",", "").replace("_", ""), re.IGNORECASE)
    return None if found is None else Decimal(found[1]) * factors[found[2].upper()]


def _shown(count: int, factors: dict[str, int], unit: str = "") -> str:
    for suffix, factor in reversed(factors.items()):
        if suffix and count and count % factor == 0:
            return f"{count // factor}{suffix}{unit}"
    return str(count)
