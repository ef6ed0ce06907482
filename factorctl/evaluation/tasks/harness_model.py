"""The model as lm-eval sees it: its own `HFLM`, with our progress, and a batch size that gives way to memory."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorctl.errors import ResourceError, UsageError
from factorctl.memory import free_memory
from factorctl.progress import Progress, Task

Result = TypeVar("Result")

MAX_ROWS = 64
CPU_TOKENS = 2048
"""Tokens after which a larger batch gains a CPU nothing."""
SHARE = 0.5
"""Of the free memory, since the estimate knows nothing of the allocator or the neighbours."""


class AnswerCounter:
    """lm-eval calls its cache's `add_partial` once per answer: a place to count, while nothing is cached."""

    def __init__(self) -> None:
        self.stage: Task | None = None
        self._seen = self._shown = 0

    def start(self) -> None:
        """A pass over the requests begins, the first or one with smaller batches."""
        self._seen = 0

    def watch(self, stage: Task | None) -> None:
        self.stage, self._seen, self._shown = stage, 0, 0

    def add_partial(self, kind: str, request: object, answer: object) -> None:
        self._seen += 1
        if self.stage is not None and self._seen > self._shown:
            self._shown = self._seen
            self.stage.advance()


class HarnessModel(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """An in-memory model for `lm_eval.evaluator.evaluate`, good for one task.

    Args:
        batch_size: prompts at once; "auto" takes what fits the free memory at the longest prompt, anew for every
            task and model. Either is halved when memory runs out, down to one.
        title: of the stage that is reported to `progress`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int | Literal["auto"],
        title: str,
        progress: Progress,
    ) -> None:
        # a copy, since HFLM gives the tokenizer a padding token
        super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=1)
        self.smallest_batch: int | None = None
        self._asked, self._title, self._progress = batch_size, title, progress
        self._counter = AnswerCounter()
        self.set_cache_hook(self._counter)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        with self._stage(len(requests)):
            answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        longest = max(len(self.tok_encode(request.args[0])) for request in requests) + self.max_gen_toks
        attempt = functools.partial(super().generate_until, requests, disable_tqdm=True)
        with self._stage(len(requests)):
            texts: list[str] = self._in_fitting_batches(longest, attempt)
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        lengths = [len(context) + len(answer) - 1 for _, context, answer in requests]
        self._check_lengths(lengths, max(len(answer) for *_, answer in requests))
        attempt = functools.partial(super()._loglikelihood_tokens, requests, disable_tqdm=True)
        answers: list[tuple[float, bool]] = self._in_fitting_batches(max(lengths), attempt)
        return answers

    def _check_lengths(self, lengths: Sequence[int], longest_answer: int) -> None:
        if longest_answer > self.max_length:
            raise UsageError(
                f"{self._title}: an answer of {longest_answer} tokens does not fit the model's {self.max_length}",
                "choose a model with a longer context, or another task",
            )
        if cut := sum(length > self.max_length for length in lengths):
            self._progress.note(
                f"{self._title}: {cut} of {len(lengths)} prompts are longer than the model's {self.max_length} tokens "
                "and lose their beginning"
            )

    def _in_fitting_batches(self, length: int, attempt: Callable[[], Result]) -> Result:
        """`attempt()` with the batch size in `batch_size_per_gpu`, again with half of it while memory runs out.

        lm-eval sorts requests by length, longest first, so what does not fit shows at once.
        """
        length = max(1, min(length, self.max_length))
        size = fitting_batch_size(self.model, length) if self._asked == "auto" else self._asked
        while True:
            self.batch_size_per_gpu = size
            self._counter.start()
            try:
                result = attempt()
            except (RuntimeError, MemoryError) as error:
                if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
                    raise
                if size == 1:
                    raise ResourceError(
                        f"{self._title}: memory does not hold one prompt of {length} tokens",
                        "free memory, choose --dtype bfloat16, or leave this task out",
                    ) from error
            else:
                self.smallest_batch = min(size, self.smallest_batch or size)
                return result
            clear_device_cache(garbage_collection=True)  # outside the handler: its traceback holds the tensors
            self._progress.note(f"{self._title}: memory does not hold {size} prompts at once; taking {size // 2}")
            size //= 2

    @contextmanager
    def _stage(self, total: int) -> Iterator[None]:
        with self._progress.stage(self._title, total=total, unit="answers") as stage:
            self._counter.watch(stage)
            try:
                yield
            finally:
                self._counter.watch(None)


def fitting_batch_size(model: PreTrainedModel, length: int) -> int:
    """Rows of `length` tokens that may go through `model` at once: at least 1, at most 64."""
    device = model.device
    rows = int(SHARE * free_memory(device)) // row_bytes(model.config, length, model.dtype.itemsize)
    if device.type == "cpu":
        rows = min(rows, CPU_TOKENS // length)
    return max(1, min(rows, MAX_ROWS))


def row_bytes(config: Any, length: int, itemsize: int) -> int:
    """Bytes that one row of `length` tokens takes at its peak: logits three times over, one layer, the KV cache."""
    config = config.get_text_config()
    heads, hidden = config.num_attention_heads, config.hidden_size
    head = getattr(config, "head_dim", None) or hidden // heads
    key_values = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * head
    layer = 8 * hidden + 4 * (getattr(config, "intermediate_size", None) or 4 * hidden) + heads * length
    return int(length * itemsize * (3 * config.vocab_size + layer + key_values))
