"""Continuing prompts by transformers' `generate()`, as users run it, each step timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from factorctl.pipeline.trial.engines import OnText, Sampling
from factorctl.pipeline.trial.result import Continuation
from factorctl.profiling.runtime import synchronised_clock


class TransformersEngine:
    """A transformers model and the tokenizer that both models share."""

    def __init__(
        self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]
    ) -> None:
        """Args:
        ends: tokens that end a text, the same ones for both models.
        """
        self.name, self.model, self.tokenizer, self.ends = name, model, tokenizer, ends
        model.generation_config = GenerationConfig()  # its own defaults would sample or penalise where nobody asked to

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def continuation(self, prompt: Sequence[int], sampling: Sampling, on_text: OnText) -> Continuation:
        ids_1P = torch.tensor([list(prompt)], device=self.device)
        streamer = TimedStreamer(self.tokenizer, on_text, self.device)
        generate: Any = self.model.generate  # typed as if modules had tensors alone
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(sampling.seed)
            generate(
                ids_1P,
                attention_mask=torch.ones_like(ids_1P),
                generation_config=self._settings(sampling),
                streamer=streamer,
            )
        tokens = streamer.tokens
        return Continuation(
            text=str(self.tokenizer.decode(tokens, skip_special_tokens=True)),
            tokens=tokens,
            ended=tokens[-1] in self.ends,
            first_token_ms=1e3 * streamer.seconds[0],
            decode_ms=1e3 * sum(streamer.seconds[1:]),
        )

    def _settings(self, sampling: Sampling) -> GenerationConfig:
        ends = sorted(self.ends)
        common = {
            "max_new_tokens": sampling.max_new_tokens,
            "eos_token_id": ends or None,
            "pad_token_id": ends[0] if ends else 0,  # one sequence is never padded, but generate() wants it named
        }
        if sampling.greedy:
            return GenerationConfig(do_sample=False, **common)
        return GenerationConfig(
            do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p or 1.0, top_k=0, **common
        )

    def choices(self, prompt: Sequence[int], continuation: Sequence[int]) -> list[int]:
        ids_1L = torch.tensor([[*prompt, *continuation[:-1]]], device=self.device)
        with torch.no_grad():
            logits_1LV = self.model(ids_1L, use_cache=False, logits_to_keep=len(continuation)).logits
        chosen: list[int] = logits_1LV[0].argmax(-1).tolist()
        return chosen

    def close(self) -> None:
        del self.model


class TimedStreamer(TextStreamer):
    """Hands out text in whole words and keeps the tokens, with the time that each took.

    The first call brings the prompt, before anything is computed. On a CPU what the listener takes to show the text
    is not the model's time; a GPU computes on meanwhile, so there it is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: OnText, device: torch.device) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tokens: list[int] = []
        self.seconds: list[float] = []
        self._on_text, self._clock, self._overlaps = on_text, synchronised_clock(device), device.type == "cuda"
        self._since: float | None = None

    def put(self, value: torch.Tensor) -> None:
        now = self._clock()
        if self._since is not None:
            self.tokens += value.reshape(-1).tolist()
            self.seconds.append(now - self._since)
        super().put(value)  # type: ignore[no-untyped-call]
        self._since = now if self._overlaps else self._clock()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)
