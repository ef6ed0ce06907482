"""Continuing prompts by llama.cpp's server, in a process of its own, each continuation timed by llama.cpp itself."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from transformers import PreTrainedTokenizerBase

from factorctl.errors import FactorctlError
from factorctl.exporting.check.llama_cpp import llama_cpp_name, telling_line
from factorctl.pipeline.trial import llama_cpp_server
from factorctl.pipeline.trial.engines import OnText, Sampling
from factorctl.pipeline.trial.result import Continuation

SMALLEST_CONTEXT = 512
"""Positions that the server keeps room for; a longer prompt starts it anew with twice as many as it needs."""
SECONDS_TO_END = 20
"""For a server that is asked to end: it may be in the middle of a continuation that nobody reads any more."""


class LlamaCppEngine:
    """A GGUF file on the CPU. Prompts are given as token ids, so that both models are given the same."""

    def __init__(self, gguf: Path, tokenizer: PreTrainedTokenizerBase, *, context: int, ends: frozenset[int]) -> None:
        """Args:
        context: positions that the model knows.
        ends: tokens that end a text; the file's own stop llama.cpp.
        """
        self.name, self.gguf, self.tokenizer, self.ends = llama_cpp_name(), gguf, tokenizer, ends
        self._most, self._server = context, Server(gguf, min(context, SMALLEST_CONTEXT))

    def continuation(self, prompt: Sequence[int], sampling: Sampling, on_text: OnText) -> Continuation:
        self._make_room(len(prompt) + sampling.max_new_tokens)
        body = {"prompt": list(prompt), "n_predict": sampling.max_new_tokens, "return_tokens": True,
                "cache_prompt": False, **_sampler(sampling)}  # fmt: skip
        tokens: list[int] = []
        reply: dict[str, Any] = {}
        for reply in self._server.stream("/completion", body):
            tokens += reply["tokens"]
            if reply["content"]:
                on_text(reply["content"])
        if len(tokens) != reply["tokens_predicted"]:  # those that end inside a character are not streamed
            reply = self._server.post("/completion", body)
            tokens = reply["tokens"]
        timings = reply["timings"]
        return Continuation(
            text=str(self.tokenizer.decode(tokens, skip_special_tokens=True)),
            tokens=tokens,
            ended=reply["stop_type"] == "eos",
            first_token_ms=float(timings["prompt_ms"]),
            decode_ms=float(timings["predicted_ms"]),
        )

    def choices(self, prompt: Sequence[int], continuation: Sequence[int]) -> list[int]:
        self._make_room(len(prompt) + len(continuation))
        greedy = {"n_predict": 1, "return_tokens": True, "cache_prompt": True, **_sampler(Sampling(1))}
        chosen = []
        for place in range(len(continuation)):
            reply = self._server.post("/completion", {"prompt": [*prompt, *continuation[:place]], **greedy})
            chosen.append(int(reply["tokens"][0]))
        return chosen

    def close(self) -> None:
        self._server.close()

    def _make_room(self, positions: int) -> None:
        if positions > self._server.context:
            self._server.close()
            self._server = Server(self.gguf, min(self._most, 2 * positions))


def _sampler(sampling: Sampling) -> dict[str, Any]:
    """The same distribution as transformers': temperature first, then the likeliest tokens, nothing else."""
    settings = {"temperature": sampling.temperature, "repeat_penalty": 1.0, "seed": sampling.seed}
    if sampling.greedy:
        return settings
    return {**settings, "samplers": ["temperature", "top_p"], "top_p": sampling.top_p or 1.0}


class Server:
    """llama.cpp's server with one GGUF file loaded."""

    def __init__(self, gguf: Path, context: int) -> None:
        """Raises:
        FactorctlError: llama.cpp does not take the file.
        """
        self.context = context
        request = {"gguf": str(gguf.resolve()), "context": context, "threads": torch.get_num_threads()}
        self._log: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # as long as the server
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(Path(llama_cpp_server.__file__).resolve()), json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            errors="replace",
        )
        assert self._process.stdout is not None
        lines = (line for line in self._process.stdout if line.startswith("{"))
        if (first := next(lines, None)) is None:
            said = self._said()
            self.close()
            raise FactorctlError(f"llama.cpp does not run {gguf}: {said}", "try it in llama-cli")
        self._address = str(json.loads(first)["address"])
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        with self._open(route, body) as reply:
            answer: dict[str, Any] = json.load(reply)
        return answer

    def stream(self, route: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The server's events, one for each token that completes a character, and a last one with the timings."""
        with self._open(route, {**body, "stream": True}) as reply:
            for line in reply:
                if line.startswith(b"data: {"):
                    yield json.loads(line.removeprefix(b"data: "))

    def _open(self, route: str, body: dict[str, Any]) -> Any:
        asked = urllib.request.Request(
            self._address + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            return self._opener.open(asked)
        except OSError as error:
            raise FactorctlError(f"llama.cpp stopped: {error}; {self._said()}", "try it in llama-cli") from error

    def _said(self) -> str:
        self._log.seek(0)
        return telling_line(self._log.read())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
