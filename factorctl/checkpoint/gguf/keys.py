"""The hyperparameters of a GGUF file, accounted for: each key is taken, found to be neutral, or refused by name."""

from __future__ import annotations

from typing import Any

from factorctl.checkpoint.gguf.header import GIVE_HF, GgufHeader
from factorctl.errors import UsageError


class Hyperparameters:
    """The keys `ARCHITECTURE.*` of a GGUF file, each to be asked for by what follows the architecture's name.

    `refuse_rest` names what nobody asked for. Keys outside of that prefix describe the file (`general.*`), its
    tokenizer, or are a quantiser's own, and change nothing that is computed.
    """

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        self._prefix = f"{header.architecture}."
        self._left = {key for key in header.keys if key.startswith(self._prefix)}

    def name(self, key: str) -> str:
        """The key as it stands in the file."""
        return self._prefix + key

    def value(self, key: str, default: Any = None) -> Any:
        """The value, or `default`; a list of equal values (one per layer) counts as that value.

        Raises:
            UsageError: layers differ.
        """
        self._left.discard(self.name(key))
        found = self.header.keys.get(self.name(key), default)
        if isinstance(found, list):
            if len(set(found)) != 1:
                raise UsageError(
                    f"{self.header.path}: {self.name(key)} differs from layer to layer ({str(found)[:60]}), which it "
                    "does in none of the families that can be factored",
                    GIVE_HF,
                )
            return found[0]
        return found

    def integer(self, key: str, default: int | None = None) -> int:
        """Raises:
        UsageError: the key is missing and has no default, or is no whole number.
        """
        found = self.value(key, default)
        if found is None:
            raise UsageError(f"{self.header.path} lacks the key {self.name(key)}", "fetch the file again")
        if isinstance(found, bool) or not isinstance(found, int):
            raise self._misfit(key, found)
        return found

    def number(self, key: str, default: float | None = None) -> float:
        """Raises:
        UsageError: the key is missing and has no default, or is no number.
        """
        found = self.value(key, default)
        if found is None:
            raise UsageError(f"{self.header.path} lacks the key {self.name(key)}", "fetch the file again")
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            raise self._misfit(key, found)
        return float(found)

    def text(self, key: str, default: str) -> str:
        return str(self.value(key, default))

    def expect(self, key: str, *neutral: object) -> None:
        """Take a key that may only say what holds without it.

        Raises:
            UsageError: it says something else.
        """
        found = self.value(key, neutral[0])
        if not any(_equal(found, allowed) for allowed in neutral):
            raise self._misfit(key, found)

    def pass_over(self, *keys: str) -> None:
        """Keys that describe and do not compute."""
        self._left -= {self.name(key) for key in keys}

    def refuse_rest(self) -> None:
        """Raises:
        UsageError: naming the first key that has no place in the family, and its value.
        """
        if self._left:
            key = min(self._left)
            more = f", and {len(self._left) - 1} more keys" if len(self._left) > 1 else ""
            raise UsageError(
                f"{self.header.path} sets {key} = {str(self.header.keys[key])[:60]}{more}, which is not read from GGUF "
                f"files of architecture {self.header.architecture!r}",
                GIVE_HF,
            )

    def _misfit(self, key: str, found: object) -> UsageError:
        return UsageError(
            f"{self.header.path} sets {self.name(key)} = {str(found)[:60]}, which no model of architecture "
            f"{self.header.architecture!r} that can be factored has",
            GIVE_HF,
        )


def _equal(found: object, allowed: object) -> bool:
    if isinstance(found, float) or isinstance(allowed, float):
        return isinstance(found, (int, float)) and isinstance(allowed, (int, float)) and abs(found - allowed) < 1e-6
    return found == allowed
