"""The options of `factorctl try`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from factorctl.config.common import CommonConfig
from factorctl.config.option import Option
from factorctl.errors import UsageError


@dataclass(frozen=True)
class TryConfig(CommonConfig):
    """`factorctl try`."""

    checkpoint: Annotated[
        str | None,
        Option(
            "A checkpoint, export, .gguf file, Hugging Face directory or Hub id. [default: the workspace's newest]",
            role="place",
            metavar="CKPT",
            positional=True,
        ),
    ] = None
    prompt: Annotated[
        str | None,
        Option(
            "What both models continue. [default: lines of stdin, until it ends]", metavar="PROMPT", positional=True
        ),
    ] = None
    prompts: Annotated[
        Path | None, Option("File of prompts: one a line, or JSON lines with a field `prompt`.", role="place")
    ] = None
    chat: Annotated[
        bool, Option("Demand that prompts go through the chat template. [default: where the tokenizer has one]")
    ] = False
    raw: Annotated[bool, Option("Continue the prompts as they are.")] = False
    max_new_tokens: Annotated[int, Option("Tokens that each model writes at most.", least=1, hint="try 64")] = 64
    temperature: Annotated[
        float | None,
        Option(
            "Draw tokens at this temperature. [default: 0, the likeliest token; 1 with --top-p]",
            least=0,
            below=float("inf"),
            hint="choose 0, which always takes the likeliest token, or a number like 0.7",
        ),
    ] = None
    top_p: Annotated[float | None, Option("Draw from the likeliest tokens that together have this probability.")] = None
    against: Annotated[str | None, Option("The dense model. [default: the dense source in the manifest]")] = None
    """In the same forms as `checkpoint`; a .gguf file is read, not run."""
    out: Annotated[Path | None, Option("Write the JSON report here.", short="-o", role="place")] = None
    """None means no file."""

    def faults(self) -> Iterator[UsageError]:
        if self.prompt is not None and self.prompts is not None:
            yield UsageError("PROMPT and --prompts were both given", "leave one of them out")
        if self.chat and self.raw:
            yield UsageError("--chat and --raw were both given", "leave one of them out")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            yield UsageError(f"--top-p {self.top_p:g} is out of range", "choose a number above 0 and up to 1, like 0.9")
        elif self.top_p is not None and self.temperature == 0:
            yield UsageError(
                f"--top-p {self.top_p:g} chooses nothing at --temperature 0, which always takes the likeliest token",
                "leave out one of them",
            )

    @property
    def sampled_at(self) -> float:
        """The temperature that is meant; 0 is greedy."""
        if self.temperature is not None:
            return self.temperature
        return 0.0 if self.top_p is None else 1.0

    @property
    def wants_chat(self) -> bool | None:
        """Whether the chat template is asked for; None where that is the tokenizer's to say."""
        return True if self.chat else False if self.raw else None
