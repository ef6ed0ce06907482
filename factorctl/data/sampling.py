"""`self`: text sampled from the dense model, so that no data is needed at all.

Each document starts from BOS (from a random token where the tokenizer has none) and is drawn token by token from the
model's own distribution until EOS, another BOS, or `document_length`, in batches with a KV cache. Training on such
text goes back to LLM-QAT (arXiv 2305.17888). A document keeps the ids that were drawn: decoding and encoding them again
would change some.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from factorctl.data.documents import Document
from factorctl.data.identity import hash_json, tokenizer_fingerprint
from factorctl.errors import UsageError
from factorctl.progress import Progress, SilentProgress, Task

SAMPLING_VERSION = 1
"""Raised whenever the same model and seed would give other text."""


@dataclass(frozen=True)
class ModelSampler:
    """The documents of `self` for `build_token_blocks`: the model is loaded only where the cache has no blocks."""

    load_model: Callable[[], PreTrainedModel]
    model_hash: str
    """Hash of the dense checkpoint, part of the cache key."""
    tokenizer: PreTrainedTokenizerBase
    document_length: int = 256
    batch_size: int = 32
    temperature: float = 1.0
    top_k: int | None = None

    @property
    def fingerprint(self) -> str:
        return hash_json(
            {
                "sampling_version": SAMPLING_VERSION,
                "model": self.model_hash,
                "tokenizer": tokenizer_fingerprint(self.tokenizer),
                "document_length": self.document_length,
                "batch_size": self.batch_size,
                "temperature": self.temperature,
                "top_k": self.top_k,
            }
        )

    def __call__(self, *, tokens: int, seed: int, progress: Progress) -> Iterator[Document]:
        return sample_documents(
            self.load_model(),
            self.tokenizer,
            tokens=tokens,
            document_length=self.document_length,
            batch_size=self.batch_size,
            seed=seed,
            temperature=self.temperature,
            top_k=self.top_k,
            progress=progress,
        )


def sample_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    document_length: int = 256,
    batch_size: int = 32,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    progress: Progress | None = None,
) -> Iterator[Document]:
    """Documents of at least `tokens` tokens in all; the last ones may be cut short by that budget.

    The global random state is neither read nor changed. The same seed gives the same text on the same device, dtype
    and versions, as far as the model's kernels are deterministic (on the CPU they are).

    Raises:
        UsageError: a size or temperature out of range, or documents longer than the model's context.
    """
    _check(model, document_length, batch_size, temperature, top_k)
    draw = _Draw(model, tokenizer, seed, temperature, top_k)
    drawn = documents = 0
    with (progress or SilentProgress()).stage("Sampling text", total=tokens, unit="tokens") as task:
        while drawn < tokens:
            mean_length = drawn / documents if documents else document_length
            rows = min(batch_size, math.ceil((tokens - drawn) / mean_length))
            for ids in draw.batch(rows, document_length, tokens - drawn, task):
                drawn += len(ids)
                documents += 1
                text = str(tokenizer.decode(ids, skip_special_tokens=True))
                yield Document(text=text, source="self", id=f"self:{documents}", tokens=ids)


class _Draw:
    """One seeded stream of random draws. R rows still running, L document_length, V vocabulary."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        temperature: float,
        top_k: int | None,
    ) -> None:
        self._model = model
        self._temperature = temperature
        self._top_k = top_k
        self._generator = torch.Generator(device=model.device).manual_seed(seed)
        self._bos = tokenizer.bos_token_id
        # embeddings may be padded beyond the tokenizer, and such ids mean nothing
        ids = set(tokenizer.get_vocab().values())
        self._vocabulary = min(max(ids) + 1, int(model.config.get_text_config().vocab_size))
        plain = sorted(i for i in ids - set(tokenizer.all_special_ids) if i < self._vocabulary)
        self._first_tokens = torch.tensor(plain, device=model.device)
        self._stops = torch.tensor(_stop_ids(model, tokenizer), dtype=torch.long, device=model.device)

    @torch.inference_mode()
    def batch(self, rows: int, length: int, budget: int, task: Task) -> list[list[int]]:
        """`rows` documents of at most `length` tokens; all end early once they hold `budget` tokens together."""
        was_training = self._model.training
        self._model.eval()
        try:
            return self._run(rows, length, budget, task)
        finally:
            self._model.train(was_training)

    def _run(self, rows: int, length: int, budget: int, task: Task) -> list[list[int]]:
        current_R = self._start(rows)
        documents = [[token] for token in current_R.tolist()]
        running = list(range(rows))
        cache, drawn = DynamicCache(config=self._model.config), rows
        task.advance(rows)
        for _ in range(length - 1):
            if not running or drawn >= budget:
                break
            logits_R1V = self._model(input_ids=current_R[:, None], past_key_values=cache, use_cache=True).logits
            current_R = self._pick(logits_R1V[:, -1, : self._vocabulary])
            added = [(row, token) for row, token in zip(running, current_R.tolist(), strict=True) if token != self._bos]
            for row, token in added:
                documents[row].append(token)
            drawn += len(added)
            task.advance(len(added))
            alive_R = ~torch.isin(current_R, self._stops)
            if not bool(alive_R.all()):
                kept = torch.nonzero(alive_R).flatten()
                cache.batch_select_indices(kept)
                current_R = current_R[kept]
                running = [running[index] for index in kept.tolist()]
        return documents

    def _start(self, rows: int) -> torch.Tensor:
        """First tokens [R]: BOS, or random ones where there is none."""
        if self._bos is not None:
            return torch.full((rows,), self._bos, device=self._model.device)
        picks = torch.randint(
            len(self._first_tokens), (rows,), generator=self._generator, device=self._generator.device
        )
        return self._first_tokens[picks]

    def _pick(self, logits_RV: torch.Tensor) -> torch.Tensor:
        """One token per row [R], from the `top_k` likeliest where that is set."""
        if self._top_k is None:
            return self._draw(logits_RV)
        best_RK, ids_RK = torch.topk(logits_RV, min(self._top_k, logits_RV.shape[-1]), dim=-1)
        return ids_RK.gather(1, self._draw(best_RK)[:, None])[:, 0]

    def _draw(self, logits_RV: torch.Tensor) -> torch.Tensor:
        """One index per row [R] by inversion of the cumulative distribution.

        One random number a row: torch.multinomial draws one per row and entry, a fifth of the time of a small model.
        The sum runs in float64, so that it resolves the smallest probability of float32.
        """
        probabilities_RV = torch.softmax(logits_RV.float() / self._temperature, dim=-1)
        cumulative_RV = probabilities_RV.cumsum(dim=-1, dtype=torch.float64)
        uniform_R1 = torch.rand(
            (len(logits_RV), 1), generator=self._generator, dtype=torch.float64, device=logits_RV.device
        )
        picks_R1 = torch.searchsorted(cumulative_RV, uniform_R1 * cumulative_RV[:, -1:], right=True)
        return picks_R1[:, 0].clamp(max=logits_RV.shape[-1] - 1)


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """EOS of the tokenizer and those of the generation config (chat models have several), and BOS: models trained on
    text that is joined by BOS alone end a document by starting the next, whose BOS is then left out."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    several = configured if isinstance(configured, list) else [configured]
    return sorted(
        {int(stop) for stop in [tokenizer.bos_token_id, tokenizer.eos_token_id, *several] if stop is not None}
    )


def _check(
    model: PreTrainedModel, document_length: int, batch_size: int, temperature: float, top_k: int | None
) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if document_length < 2 or (context is not None and document_length > context):
        raise UsageError(
            f"documents of {document_length} tokens cannot be sampled from a model with a context of {context}",
            f"choose 2 to {context} tokens",
        )
    if batch_size < 1 or not temperature > 0 or (top_k is not None and top_k < 1):
        raise UsageError(
            f"cannot sample with batch size {batch_size}, temperature {temperature:g}, top_k {top_k}",
            "choose a batch size and top_k of 1 or more, and a temperature above 0",
        )
