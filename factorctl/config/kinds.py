"""Sorts of values that options take: how people write them, and how they are written back.

A kind has a `metavar`, how `--help` names it, and three ways:

    read(texts, where)     what a command line says
    taken(value, where)    what TOML or JSON holds: the value itself, or the text that a command line takes
    written(value)         the texts of a command line that give the value back: read(written(v), where) == v

`where` is what a message calls the option. Reading and taking raise `UsageError`.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args, get_origin

from factorctl.config.quantities import (
    parse_byte_count,
    parse_duration,
    parse_token_count,
    show_byte_count,
    show_token_count,
)
from factorctl.errors import UsageError, did_you_mean

T = TypeVar("T")


@dataclass(frozen=True)
class Single(Generic[T]):
    """One text, one value."""

    metavar: str
    words: str
    """What it is, in messages: "a whole number"."""
    parse: Callable[[str, str], T]
    show: Callable[[T], str] = str
    native: tuple[type, ...] = ()
    """Types of TOML that say it without quotes."""
    choices: tuple[str, ...] = ()

    repeats: ClassVar[bool] = False

    def read(self, texts: Sequence[str], where: str) -> T:
        return self.parse(texts[-1], where)

    def taken(self, value: object, where: str) -> T:
        if isinstance(value, str) or type(value) in self.native:  # a bool is an int to isinstance
            return self.parse(str(value), where)
        raise UsageError(f"{where} = {value!r} is not {self.words}")

    def written(self, value: T) -> list[str]:
        return [self.show(value)]


@dataclass(frozen=True)
class Switch:
    """Given or not, as --refit."""

    metavar: str = ""

    repeats: ClassVar[bool] = False

    def read(self, texts: Sequence[str], where: str) -> bool:
        return texts[-1] == "true"

    def taken(self, value: object, where: str) -> bool:
        if isinstance(value, bool):
            return value
        raise UsageError(f"{where} = {value!r} is not true or false")

    def written(self, value: bool) -> list[str]:
        return [str(value).lower()]


@dataclass(frozen=True)
class Listed(Generic[T]):
    """Several values in one text: 1,8,32."""

    of: Single[T]
    words: str
    example: str
    metavar: str = "<list>"

    repeats: ClassVar[bool] = False

    def read(self, texts: Sequence[str], where: str) -> tuple[T, ...]:
        try:
            found = [self.of.parse(part.strip(), where) for part in texts[-1].split(",")]
        except UsageError:
            raise UsageError(
                f"{where} {texts[-1]} is no list of {self.words}", f"for example {where} {self.example}"
            ) from None
        return tuple(value for value in found if value != "")

    def taken(self, value: object, where: str) -> tuple[T, ...]:
        if isinstance(value, str):
            return self.read([value], where)
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(self.of.taken(item, where) for item in items)

    def written(self, value: Sequence[T]) -> list[str]:
        return [",".join(self.of.show(item) for item in value)]


@dataclass(frozen=True)
class Repeated(Generic[T]):
    """Several values, each with a flag of its own: --data A --data B."""

    of: Single[T]

    repeats: ClassVar[bool] = True

    @property
    def metavar(self) -> str:
        return self.of.metavar

    def read(self, texts: Sequence[str], where: str) -> tuple[T, ...]:
        return tuple(self.of.parse(text, where) for text in texts)

    def taken(self, value: object, where: str) -> tuple[T, ...]:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(self.of.taken(item, where) for item in items)

    def written(self, value: Sequence[T]) -> list[str]:
        return [self.of.show(item) for item in value]


@dataclass(frozen=True)
class Pairs(Generic[T]):
    """NAME=VALUE, repeated: a mapping; in TOML a table."""

    of: Single[T]
    words: str
    example: str

    repeats: ClassVar[bool] = True

    @property
    def metavar(self) -> str:
        return f"<{self.words.lower()}>"

    def read(self, texts: Sequence[str], where: str) -> dict[str, T]:
        found: dict[str, T] = {}
        for text in texts:
            name, separator, value = text.partition("=")
            try:
                if not separator or not name:
                    raise UsageError("no pair")
                read = self.of.parse(value, where)
            except UsageError:
                raise UsageError(
                    f"{where} {text!r} is no {self.words}", f"for example {where} {self.example}"
                ) from None
            if name in found:
                raise UsageError(f"{where} {name} is given twice")
            found[name] = read
        return found

    def taken(self, value: object, where: str) -> dict[str, T]:
        if not isinstance(value, Mapping):
            raise UsageError(f"{where} = {value!r} is not a table")
        return {str(name): self.of.taken(item, f"{where}.{name}") for name, item in value.items()}

    def written(self, value: Mapping[str, T]) -> list[str]:
        return [f"{name}={self.of.show(item)}" for name, item in value.items()]


Kind = Single[Any] | Switch | Listed[Any] | Repeated[Any] | Pairs[Any]


def _number(of: Callable[[str], T], words: str, example: str) -> Callable[[str, str], T]:
    def parse(text: str, where: str) -> T:
        try:
            return of(text)
        except ValueError:
            raise UsageError(f"{where} {text!r} is not {words}", f"for example {where} {example}") from None

    return parse


def _tokens_or_0(text: str, where: str) -> int:
    return 0 if text.strip() == "0" else parse_token_count(text, where)


def _auto_or_whole(text: str, where: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{where} {text} is neither auto nor a number", f"for example {where} 8") from None


def _shortest(value: float) -> str:
    return short if float(short := f"{value:g}") == value else repr(value)


WHOLE = Single("<int>", "a whole number", _number(int, "a whole number", "8"), native=(int,))
NUMBER = Single("<float>", "a number", _number(float, "a number", "0.25"), _shortest, (int, float))
TEXT = Single("<str>", "text", lambda text, _: text)
ANY_TEXT = Single("<str>", "text", lambda text, _: text, native=(int, float, bool))
"""Text that someone else reads: TOML's numbers count as what they look like."""
PATH = Single("<path>", "a path", lambda text, _: Path(text).expanduser())
SWITCH = Switch()
TOKENS = Single("<tokens>", "a number of tokens", parse_token_count, show_token_count, (int,))
TOKENS_OR_0 = Single("<tokens>", "a number of tokens", _tokens_or_0, show_token_count, (int,))
SIZE = Single("<size>", "a number of bytes", parse_byte_count, show_byte_count, (int,))
TIME = Single("<time>", "a time", parse_duration, _shortest, (int, float))
AUTO_OR_WHOLE = Single("<int|auto>", "a whole number or auto", _auto_or_whole, native=(int,))


def choice(*values: str) -> Single[str]:
    """One of some words."""

    def parse(text: str, where: str) -> str:
        if text not in values:
            raise UsageError(f"{where} {text} is not known", did_you_mean(text, values))
        return text

    return Single(f"<{'|'.join(values)}>", f"one of {', '.join(values)}", parse, choices=values)


_KINDS: Mapping[Any, Kind] = {int: WHOLE, float: NUMBER, str: TEXT, bool: SWITCH, Path: PATH}


def kind_of(hint: Any) -> Kind:
    """The kind of a field that names none: its annotation says it."""
    if get_origin(hint) in (typing.Union, types.UnionType):
        [hint] = [part for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) is Literal:
        return choice(*get_args(hint))
    if get_origin(hint) is tuple:
        of = kind_of(get_args(hint)[0])
        assert isinstance(of, Single)
        return Repeated(of)
    return _KINDS[hint]
