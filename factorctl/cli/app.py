"""The command table, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Annotated, NoReturn

import typer

from factorctl import __version__
from factorctl.cli import evaluate, export, factorize, finetune, frontier, inspect, profile, run, trial
from factorctl.cli.command import command
from factorctl.config.evaluate import EvalConfig
from factorctl.config.export import ExportConfig
from factorctl.config.factorize import FactorizeConfig
from factorctl.config.finetune import FinetuneConfig
from factorctl.config.frontier import FrontierConfig
from factorctl.config.profile import ProfileConfig
from factorctl.config.trial import TryConfig
from factorctl.errors import ExitCode, FactorctlError
from factorctl.quiet import quieten_libraries

app = typer.Typer(
    name="factorctl",
    help="Turn a dense Llama-family language model into a sparse Mixture-of-Experts, and prove what it cost and won.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: Sequence[tuple[str, Callable[..., None], str]] = (
    ("factorize", command(FactorizeConfig, factorize.factorize), "Split every FFN of a dense model into experts."),
    ("finetune", command(FinetuneConfig, finetune.finetune), "Train routers and experts against the dense teacher."),
    (
        "eval",
        command(EvalConfig, evaluate.evaluate),
        "Say what factoring cost, beside the dense model and controls.",
    ),
    (
        "profile",
        command(ProfileConfig, profile.profile, rehearses=False),
        "Say what factoring won: FLOPs, latency, memory.",
    ),
    ("try", command(TryConfig, trial.try_), "Let the dense and the factored model continue the same prompt."),
    ("export", command(ExportConfig, export.export), "Turn a checkpoint into what unmodified stock engines run."),
    ("frontier", command(FrontierConfig, frontier.frontier), "Try splits, measure them, and choose one for a budget."),
    ("run", run.run, "Run a recipe's stages, redoing only what changed."),
    ("demo", run.demo, "Take a small real model through every stage."),
    ("inspect", inspect.inspect, "Say what a checkpoint is, what it was made from and how."),
    ("verify", inspect.verify, "Check every file of a checkpoint against its manifest."),
    ("plugins", inspect.plugins, "List partition strategies and model aliases."),
    ("doctor", inspect.doctor, "Report what this machine has and what is missing."),
)
"""Name, function, and what `factorctl --help` says of it: one sentence that fits into a line of 80 columns."""

for name, run_command, summary in COMMANDS:
    app.command(name, short_help=summary)(run_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"factorctl {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; anything but a FactorctlError is a bug and keeps its traceback."""
    quieten_libraries()
    _received.clear()
    signal.signal(signal.SIGTERM, _on_signal)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores it
        signal.signal(signal.SIGINT, _on_signal)
    try:
        app()
    except FactorctlError as error:
        from factorctl.cli.render import show_error

        show_error(error)
        if os.environ.get("FACTORCTL_DEBUG"):
            traceback.print_exc()
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _exit_interrupted()
    except SystemExit as end:
        if end.code == ExitCode.INTERRUPTED:  # what typer makes of a KeyboardInterrupt, without a word
            _exit_interrupted()
        raise
    except Exception:
        if _received:  # a library that is interrupted while it is imported makes an ImportError of it
            _exit_interrupted()
        raise


_received: list[int] = []
GOING_ON_ALONE = frozenset({"factorize", "export", "run", "demo", "frontier"})
"""Verbs whose same command goes on where it stopped. `finetune` and `eval` take --resume, and say so themselves."""


def _on_signal(received: int, _frame: FrameType | None) -> None:
    """SIGTERM unwinds like Ctrl-C, so that locks and temporary files are cleaned up."""
    _received.append(received)
    raise KeyboardInterrupt


def _exit_interrupted() -> NoReturn:
    terminated = signal.SIGTERM in _received
    word = "terminated" if terminated else "interrupted"
    goes_on = not GOING_ON_ALONE.isdisjoint(sys.argv[1:2])
    hint = "; finished parts are kept: run the same command again to go on" if goes_on else ""
    sys.stderr.write(f"{word}{hint}\n")
    sys.exit(128 + signal.SIGTERM if terminated else ExitCode.INTERRUPTED)
