"""Token counts as people write them: 64K, 40M, 1.5B."""

from __future__ import annotations

import re
from decimal import Decimal

from factorctl.errors import UsageError

_SUFFIXES = {"": 1, "K": 1_000, "M": 1_000_000, "B": 1_000_000_000}
_PATTERN = re.compile(r"(\d+(?:\.\d+)?)([KMB]?)", re.IGNORECASE)


def parse_token_count(text: str, option: str = "--tokens") -> int:
    """The number that `text` means: K, M and B are decimal (64K = 64,000; write 65536 for 2^16).

    >>> parse_token_count("1.5M")
    1500000

    Raises:
        UsageError: for anything that is not a whole number of tokens above 0, naming `option`.
    """
    match = _PATTERN.fullmatch(text.strip().replace(",", "").replace("_", ""))
    hint = "write a whole number, or one with K (thousand), M (million) or B (billion): 65536, 64K, 40M, 1.5B"
    if match is None:
        raise UsageError(f"{option} '{text}' is not a number of tokens", hint)
    count = Decimal(match[1]) * _SUFFIXES[match[2].upper()]
    if count <= 0 or count != int(count):
        raise UsageError(f"{option} '{text}' must be a whole number of tokens above 0", hint)
    return int(count)
