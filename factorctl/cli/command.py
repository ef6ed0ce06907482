"""A command made of its config: an option per field, all of them read and checked together."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from factorctl.cli.options import DryRunOpt, FormatOpt, OutputFormat, QuietOpt
from factorctl.config.kinds import PATH, SWITCH, Single
from factorctl.config.option import BoundOption, from_command_line, options_of

Config = TypeVar("Config")
_REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Asked:
    """What a command line says besides its config."""

    output: OutputFormat
    quiet: bool
    dry_run: bool = False


def command(config: type[Config], body: Callable[..., None], *, rehearses: bool = True) -> Callable[..., None]:
    """What typer runs: `body(config, asked)`, given what the command line means; its help is the docstring of `body`.

    Keyword-only parameters of `body` are options that are no part of the config, declared as typer wants them.

    Args:
        rehearses: whether there is a --dry-run.
    """
    options = options_of(config)
    own = inspect.signature(body, eval_str=True).parameters.values()
    extras = [parameter for parameter in own if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    asks = [_keyword("dry_run", DryRunOpt, False)] if rehearses else []
    asks += [_keyword("output", FormatOpt, "text"), _keyword("quiet", QuietOpt, False)]

    def run(**given: Any) -> None:
        read = from_command_line(config, {option.field: _texts(option, given) for option in options})
        asked = Asked(**{parameter.name: given[parameter.name] for parameter in asks})
        body(read, asked, **{parameter.name: given[parameter.name] for parameter in extras})

    parameters = [*(made for option in options for made in _parameters(option)), *extras, *asks]
    run.__doc__, run.__name__ = body.__doc__, body.__name__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    return run


def _texts(option: BoundOption, given: Mapping[str, Any]) -> list[str]:
    """What was given for one option; none where it was not."""
    if option.option.flags:
        return [meant for flag, (meant, _) in option.option.flags.items() if given[_name(flag)]]
    value = given[option.field]
    if isinstance(value, bool):
        return [str(value).lower()]
    return [] if value is None else value if isinstance(value, list) else [str(value)]


def _parameters(option: BoundOption) -> Iterator[inspect.Parameter]:
    """An option as typer takes it: a text, several, or switches; its kind reads them."""
    said, name = option.option, option.field
    if said.flags:
        for flag, (_, about) in said.flags.items():
            yield _keyword(_name(flag), Annotated[bool, typer.Option(flag, help=about)], False)
        return
    if option.kind is SWITCH:
        flag = f"{option.flag}/--no-{option.key}" if option.default else option.flag
        yield _keyword(name, Annotated[bool, typer.Option(flag, help=said.help)], option.default)
        return
    text = Path if option.kind is PATH else str  # shells complete paths
    if said.positional:
        argument = typer.Argument(help=said.help, metavar=said.metavar)
    else:
        flags = [option.flag, *([said.short] if said.short else [])]
        metavar = said.metavar or option.kind.metavar
        argument = typer.Option(*flags, help=said.help, metavar=metavar, autocompletion=_completion(option))
    if option.kind.repeats:
        yield _keyword(name, Annotated[list[str] | None, argument], None)
    elif option.required:
        yield _keyword(name, Annotated[text, argument], _REQUIRED)
    elif option.default_text is None:
        yield _keyword(name, Annotated[text | None, argument], None)
    else:
        yield _keyword(name, Annotated[text, argument], option.default_text)


def _completion(option: BoundOption) -> Callable[[str], list[str]] | None:
    choices = option.kind.choices if isinstance(option.kind, Single) else ()

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete if choices else None


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
