"""`factorctl try`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from factorctl.cli.command import Asked
from factorctl.cli.options import OutputFormat
from factorctl.config.trial import TryConfig
from factorctl.errors import UsageError

if TYPE_CHECKING:
    from factorctl.cli.render import SideBySide, Table
    from factorctl.pipeline.trial.plan import TryPlan
    from factorctl.pipeline.trial.result import Answer, Continuation, TryResult
    from factorctl.pipeline.trial.run import Side


def try_(config: TryConfig, asked: Asked) -> None:
    """Let the dense and the factored model continue the same prompt, and say where they part and how fast each is.

    An export is run by transformers alone, a GGUF by llama.cpp. One model writes after the other, so that neither
    slows the other down. A single argument with a space in it, where no such file exists, is the prompt.

    Examples:

        factorctl try runs/demo-1R4E2K "What is the capital of France?"

        factorctl try --prompts questions.txt --max-new-tokens 32 --format json

        factorctl try runs/demo-gguf "Once upon a time" --raw --temperature 0.7
    """
    from factorctl.cli.render import progress_listener

    if config.prompt is None and config.checkpoint is not None and _is_prompt(config.checkpoint):
        config = replace(config, checkpoint=None, prompt=config.checkpoint)
    progress = progress_listener(quiet=asked.quiet)
    if asked.dry_run:
        from factorctl.pipeline.trial.plan import plan_try

        _show_plan(plan_try(config, progress), asked.output)
        return
    from factorctl.pipeline.trial.run import try_models

    listener = _listener(asked.output)
    try:
        result = try_models(config, listener, progress, lines=_typed())
    finally:
        listener.end()
    _show_result(result, asked.output)


def _is_prompt(word: str) -> bool:
    """Whether a lone argument is a prompt: a model's name has no space in it, unless it is a path that exists."""
    return any(character.isspace() for character in word) and not os.path.exists(Path(word).expanduser())


def _typed() -> Iterator[str]:
    """Lines of stdin, asked for where somebody types them."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    from factorctl.cli.render import ask

    while (line := ask("prompt> ")) is not None:
        yield line


def _listener(output: OutputFormat) -> Unseen:
    if output == "json":
        return Unseen()
    if not sys.stdout.isatty():
        return InTurn()
    from factorctl.cli.render import SideBySide

    return Columns(SideBySide())


class Unseen:
    """Shows nothing until all is done."""

    def begin(self, prompt: str, titles: dict[Side, str]) -> None: ...

    def text(self, side: Side, piece: str) -> None: ...

    def written(self, side: Side, continuation: Continuation) -> None: ...

    def answered(self, answer: Answer) -> None: ...

    def refused(self, error: UsageError) -> None:
        if not sys.stdin.isatty():
            raise error
        from factorctl.cli.render import show_error

        show_error(error)

    def end(self) -> None:
        """Whatever ended the try."""


class InTurn(Unseen):
    """One text after the other, as it is written: for files and pipes."""

    def begin(self, prompt: str, titles: dict[Side, str]) -> None:
        self._titles, self._writing = titles, ""
        self._say(f"> {prompt}\n")

    def text(self, side: Side, piece: str) -> None:
        self._head(side)
        self._say(piece)

    def written(self, side: Side, continuation: Continuation) -> None:
        self._head(side)
        self._say(f"\n[{speed_of(continuation)}]\n")

    def answered(self, answer: Answer) -> None:
        self._say("\n" + "\n".join(comparison_of(answer)) + "\n\n")

    def _head(self, side: Side) -> None:
        if self._writing != side:
            self._writing = side
            self._say(f"\n{self._titles[side]}:\n")

    @staticmethod
    def _say(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


class Columns(Unseen):
    """Both texts beside one another, as they are written: for terminals."""

    def __init__(self, screen: SideBySide) -> None:
        self._screen = screen

    def begin(self, prompt: str, titles: dict[Side, str]) -> None:
        self._screen.open(prompt, titles["dense"], titles["model"])

    def text(self, side: Side, piece: str) -> None:
        self._screen.write(_column(side), piece)

    def written(self, side: Side, continuation: Continuation) -> None:
        self._screen.finish(_column(side), speed_of(continuation))

    def answered(self, answer: Answer) -> None:
        self._screen.close(comparison_of(answer))

    def end(self) -> None:
        self._screen.stop()


def _column(side: Side) -> int:
    return 0 if side == "dense" else 1


def speed_of(continuation: Continuation) -> str:
    """'64 tokens, 23.4 tokens/s, first after 120 ms'."""
    count = len(continuation.tokens)
    parts = [f"{count} token{'' if count == 1 else 's'}"]
    if continuation.steps and continuation.decode_ms:
        parts.append(f"{1e3 * continuation.steps / continuation.decode_ms:.1f} tokens/s")
    parts.append(f"first after {continuation.first_token_ms:.0f} ms")
    return ", ".join(parts) + ("" if continuation.ended else ", cut off")


def comparison_of(answer: Answer) -> list[str]:
    """Where the two part, and how much they would have chosen alike."""
    found = answer.first_difference
    if found is None:
        lines = ["no token differs"]
    else:
        lines = [f"first token that differs: {found.token}, {_quoted(found.dense)} dense, {_quoted(found.model)} here"]
    total = len(answer.dense.tokens)
    return [*lines, f"chosen alike: {answer.alike} of {total} tokens of the dense text ({answer.alike_share:.0%})"]


def _quoted(text: str | None) -> str:
    return "nothing" if text is None else repr(text)


def _show_result(result: TryResult, output: OutputFormat) -> None:
    from factorctl.cli.render import show

    tables = [_answers_table(result)] if len(result.answers) > 1 else []
    show(result, output=output, tables=tables, closing=_closing(result))


def _closing(result: TryResult) -> list[str]:
    if not result.answers:
        return ["no prompt was given", *(f"written: {path}" for path in result.written)]
    lines = [f"dense run by {result.runtime['dense']}, the other by {result.runtime['model']}"]
    if result.runtime["dense"] == result.runtime["model"]:
        lines = [f"both run by {result.runtime['model']}, {result.hardware.dtype} on {result.hardware.device}"]
    if result.speed_up is not None:
        lines.append(f"decoding at {result.speed_up:.2f}x the dense model's tokens/s; measure it: factorctl profile")
    return [*lines, *result.remarks, *(f"written: {path}" for path in result.written)]


def _answers_table(result: TryResult) -> Table:
    from factorctl.cli.render import rows_table

    rows: list[list[object]] = [
        [_short(one.prompt), one.dense_tokens_per_second, one.model_tokens_per_second,
         one.first_difference.token if one.first_difference else None, f"{one.alike_share:.0%}"]
        for one in result.answers
    ]  # fmt: skip
    total = None if result.alike_share is None else f"{result.alike_share:.0%}"
    rows.append(["all", result.dense_tokens_per_second, result.model_tokens_per_second, None, total])
    return rows_table("All prompts", ["prompt", "dense tokens/s", "tokens/s", "differs at", "alike"], rows)


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 40 else f"{prompt[:37]}..."


def _show_plan(plan: TryPlan, output: OutputFormat) -> None:
    from factorctl.cli.render import gigabytes, show_plan

    prompts = [{"prompt": prompt.text, "tokens": len(prompt.ids)} for prompt in plan.prompts]
    facts: dict[str, object] = {
        "checkpoint": str(plan.model.path),
        "source": plan.reference.id,
        "runtime": {"dense": plan.runtimes[0], "model": plan.runtimes[1]},
        "dtype": str(plan.dtype).removeprefix("torch."),
        "device": plan.device.type,
        "chat": plan.chat,
        "context": plan.context,
        "prompts": prompts,
        "max_new_tokens": plan.sampling.max_new_tokens,
        "temperature": plan.sampling.temperature,
        "top_p": plan.sampling.top_p,
        "memory_bytes": plan.memory_bytes,
        "remarks": plan.remarks,
    }
    counts = ", ".join(str(len(prompt.ids)) for prompt in plan.prompts)
    words = facts | {
        "runtime": f"dense by {plan.runtimes[0]}, the other by {plan.runtimes[1]}",
        "prompts": f"{len(prompts)}, of {counts} tokens" if prompts else "read from stdin",
        "memory_bytes": gigabytes(plan.memory_bytes),
        "remarks": "; ".join(plan.remarks) or "none",
    }
    show_plan(facts, words, output=output)
