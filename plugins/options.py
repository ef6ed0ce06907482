"""Reading the values of `--option`."""

from __future__ import annotations

from factorctl.contracts import UsageError


def whole_number(strategy: str, option: str, value: str, *, low: int, high: int) -> int:
    """`value` as a number from `low` to `high`.

    Raises:
        UsageError: it is none.
    """
    try:
        number = int(value)
    except ValueError:
        number = low - 1
    if not low <= number <= high:
        raise UsageError(
            f"strategy '{strategy}' cannot run {option}={value}", f"choose a whole number from {low} to {high}"
        )
    return number
