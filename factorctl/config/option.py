"""An option of a command, declared once: at the field of the config that it sets.

    gate: Annotated[Gate, Option("softmax over the chosen experts, or hard 0/1.")] = "softmax"

The command line's signature, the keys of recipes, what manifests record, what a fingerprint counts and the command on
a card all come from it, through `options_of(FactorizeConfig)`.
"""

from __future__ import annotations

import functools
import shlex
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

from factorctl.config.kinds import NUMBER, WHOLE, Kind, kind_of
from factorctl.errors import UsageError, did_you_mean, together

Role = Literal["content", "place", "how", "effect"]
"""What an option decides, and so who counts it:

    content   the result: recipes take it, manifests record it, fingerprints and the keys of a recipe's stages count it
    place     where things come from and go to, and what may be replaced: none of them; a recipe's runner sets it
    how       how the same result is reached: recipes take it, nothing counts it
    effect    what else is done with the result: recipes take it, a stage runs again for it, the result is the same
"""
EVERY_ROLE: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class Option:
    """What stands at a config's field, in `Annotated`, beside its type and default."""

    help: str
    flag: str | None = None
    """Where it is not called as its field is."""
    short: str | None = None
    role: Role = "content"
    kind: Kind | None = None
    """None: the annotation says it."""
    metavar: str | None = None
    """None: the kind's."""
    positional: bool = False
    flags: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Switches instead of one flag with a value: flag -> the value that it means, and its help."""
    least: float | None = None
    most: float | None = None
    below: float | None = None
    hint: str | None = None
    """What to choose where the value is out of range or no number; None: the range, or an example.

    `least`, `most` and `below` hold for a number, or for every one of a list, which then holds one at least."""

    def out_of_range(self, flag: str, value: Any) -> UsageError | None:
        """Why a number, or a list of them, cannot be this option's value; what is no number always can."""
        is_list = isinstance(value, tuple)
        numbers = value if is_list else (value,)
        if not self._is_bounded or (numbers and all(map(self._allows, numbers))):
            return None
        shown = ",".join(f"{number:g}" if isinstance(number, float) else str(number) for number in numbers) or "nothing"
        if self.least == 1 and self.most is None and self.below is None:
            fault = "holds no positive numbers only" if is_list else "is no positive number"
            return UsageError(f"{flag} {shown} {fault}", self.hint)
        return UsageError(
            f"{flag} {shown} is out of range", self.hint or self._range("numbers" if is_list else "a number")
        )

    @property
    def _is_bounded(self) -> bool:
        return any(bound is not None for bound in (self.least, self.most, self.below))

    def _allows(self, value: Any) -> bool:
        if not isinstance(value, int | float):
            return True
        return all((self.least is None or value >= self.least, self.most is None or value <= self.most,
                    self.below is None or value < self.below))  # fmt: skip

    def _range(self, wanted: str) -> str:
        if self.most is not None:
            return f"choose {wanted} from {self.least} to {self.most}"
        if self.below is not None:
            return f"choose {wanted} from {self.least:g} up to, not including, {self.below:g}"
        return f"choose {self.least:g} or more"


@dataclass(frozen=True)
class BoundOption:
    """An option and the field that it sets."""

    field: str
    default: Any
    """`dataclasses.MISSING` where there is none."""
    option: Option
    kind: Kind

    @property
    def key(self) -> str:
        """Its name in recipes."""
        return (self.option.flag or self.field).removeprefix("--").replace("_", "-")

    @property
    def flag(self) -> str:
        """Its name on the command line and in messages."""
        return self.field.upper() if self.option.positional else f"--{self.key}"

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def default_text(self) -> str | None:
        """The default as a command line says it; None where its help says what happens instead."""
        if self.required or self.default is None or self.kind.repeats:
            return None
        (text,) = self.kind.written(self.default)
        return text

    def read(self, texts: Sequence[str]) -> Any:
        """The value that a command line's texts mean.

        Raises:
            UsageError: they mean none. Of a number the hint is the option's own, if it has one.
        """
        try:
            return self.kind.read(texts, self.flag)
        except UsageError as fault:
            if self.kind in (NUMBER, WHOLE) and self.option.hint:
                raise UsageError(fault.message, self.option.hint) from None
            raise

    def spelled(self, value: object) -> list[str]:
        """The words of a command line that give this value or its JSON; none for the default.

        Raises:
            UsageError: no command line gives it.
        """
        plain = _plain(value)
        if plain is None or plain == _plain(self.default):
            return []
        taken = self.kind.taken(plain, self.flag)
        if isinstance(taken, bool):
            return [self.flag if taken else f"--no-{self.key}"]
        if self.option.flags:
            return [flag for flag, (meant, _) in self.option.flags.items() if meant == taken]
        texts = self.kind.written(cast(Any, taken))
        return [word for text in texts for word in (self.flag, shlex.quote(text))]


Config = TypeVar("Config")


def options_of(config: type) -> tuple[BoundOption, ...]:
    """The options of a config: those of the verb in the order of its fields, then those that every verb has."""
    return _options_of(cast(Any, config))  # mypy takes no type[...] for hashable


@functools.cache
def _options_of(config: type) -> tuple[BoundOption, ...]:
    hints = typing.get_type_hints(config, include_extras=True)
    common = {every.name for every in fields([kind for kind in config.__mro__ if is_dataclass(kind)][-1])}
    ordered = sorted(fields(config), key=lambda every: every.name in common)
    return tuple(_bound(every, hints[every.name]) for every in ordered)


def _bound(at: Field[Any], hint: Any) -> BoundOption:
    (option,) = (item for item in hint.__metadata__ if isinstance(item, Option))
    default = at.default if at.default_factory is MISSING else at.default_factory()
    return BoundOption(at.name, default, option, option.kind or kind_of(hint.__origin__))


def range_faults(config: object) -> Iterator[UsageError]:
    """Every number of a config that is outside of what its option allows."""
    for option in options_of(type(config)):
        if fault := option.option.out_of_range(option.flag, getattr(config, option.field)):
            yield fault


def from_command_line(config: type[Config], given: Mapping[str, Sequence[str]]) -> Config:
    """The config that a command line means.

    Args:
        given: by field, the texts that were given; none take the default. A switch's are "true" and "false".

    Raises:
        UsageError: all that is wrong with it, together.
    """
    named = {option.field: option for option in options_of(config)}
    readers = {name: functools.partial(named[name].read, texts) for name, texts in given.items() if texts}
    return _built(config, readers, [])


def from_table(config: type[Config], table: Mapping[str, Any], where: str) -> Config:
    """The config that a recipe's table means.

    Args:
        where: what messages call the table.

    Raises:
        UsageError: all that is wrong with it, together: keys that no option has, values of another kind.
    """
    known = {option.key: option for option in options_of(config) if option.option.role != "place"}
    readers, faults = {}, []
    for key, value in table.items():
        option = known.get(key.replace("_", "-"))
        if option is None:
            faults.append(UsageError(f"{where} knows no '{key}'", did_you_mean(key, known)))
        else:
            readers[option.field] = functools.partial(option.kind.taken, value, f"{where} {key}")
    if missing := [option.key for option in known.values() if option.required and option.field not in readers]:
        faults.append(UsageError(f"{where} needs {', '.join(missing)}"))
    return _built(config, readers, faults, where=f"{where} ")


def _built(
    config: type[Config], readers: Mapping[str, Callable[[], Any]], faults: list[UsageError], where: str = ""
) -> Config:
    """The config of all values that can be read, unless something is wrong with any."""
    values: dict[str, Any] = {}
    for name, read in readers.items():
        try:
            values[name] = read()
        except UsageError as fault:
            faults.append(fault)
    if all(option.field in values for option in options_of(config) if option.required):
        try:
            made = config(**values)
        except UsageError as error:
            faults += [UsageError(f"{where}{fault.message}", fault.hint) for fault in error.faults or (error,)]
        else:
            if not faults:
                return made
    raise together(faults)


def recorded(config: object, *roles: Role) -> dict[str, Any]:
    """The options of these roles by field, as JSON; without a role named, what decides the result.

    Manifests, fingerprints, reports and the keys of a recipe's stages hold it.
    """
    wanted = {option.field for option in options_of(type(config)) if option.option.role in (roles or ("content",))}
    values = {every.name: getattr(config, every.name) for every in fields(cast(Any, config)) if every.name in wanted}
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def command_line(verb: str, config: type, values: Mapping[str, Any], *, positional: str) -> str:
    """The command of a recorded configuration.

    What is at its default stays out, and so does what no command line gives: a preset's decisions, and values that no
    option takes.
    """
    words = ["factorctl", verb, positional]
    for option in options_of(config):
        if option.field in values and not option.option.positional:
            try:
                words += option.spelled(values[option.field])
            except UsageError:
                continue
    return " ".join(words)
