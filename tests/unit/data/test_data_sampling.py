"""`self`: text sampled from a model, seeded, in batches, and drawn from the right distribution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.texts import BOS, EOS, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from factorctl.data.building import build_token_blocks
from factorctl.data.documents import Document
from factorctl.data.sampling import ModelSampler, _Draw, sample_documents
from factorctl.data.spec import parse_data_spec
from factorctl.errors import UsageError
from factorctl.progress import SilentProgress, Task

WORDS = 20


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(WORDS)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Seven ids more than the tokenizer knows, as padded embeddings have."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS + 3 + 7, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.5, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, **changes: object) -> list[Document]:
    options = {"tokens": 300, "document_length": 24, "batch_size": 8, "seed": 0} | changes
    return list(sample_documents(model, tokenizer, **options))  # type: ignore[arg-type]


def ids_of(documents: list[Document]) -> list[list[int]]:
    return [list(document.tokens or ()) for document in documents]


def test_documents(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    documents = sample(model, tokenizer)
    ids = ids_of(documents)
    assert 300 <= sum(map(len, ids)) < 300 + 8
    assert all(document[0] == BOS for document in ids)
    assert all(EOS not in document[:-1] for document in ids), "a document ends at its EOS"
    assert all(BOS not in document[1:] for document in ids), "the BOS of a next document ends this one"
    assert any(document[-1] == EOS for document in ids)
    assert all(len(document) <= 24 for document in ids)
    assert max(map(max, ids)) < WORDS + 3, "padded ids are never drawn"
    assert [document.id for document in documents] == [f"self:{n + 1}" for n in range(len(documents))]
    assert documents[0].text == tokenizer.decode(ids[0], skip_special_tokens=True)


def test_seed_decides(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    assert ids_of(sample(model, tokenizer)) == ids_of(sample(model, tokenizer))
    assert ids_of(sample(model, tokenizer, seed=1)) != ids_of(sample(model, tokenizer))


def test_global_state_is_left_alone(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    model.train()
    first = ids_of(sample(model, tokenizer))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    torch.manual_seed(8)
    assert ids_of(sample(model, tokenizer)) == first
    assert not torch.is_inference_mode_enabled()


def test_cache_and_dropped_rows_change_nothing(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """At a temperature near zero each document is greedy decoding, done here without cache or batch."""
    bare = make_tokenizer(WORDS)
    bare.bos_token = None
    documents = ids_of(sample(model, bare, temperature=1e-6, tokens=200))
    assert len({document[0] for document in documents}) > 1
    assert len(set(map(len, documents))) > 1, "rows end at different steps"
    for document in documents:
        for length in range(1, len(document)):
            with torch.no_grad():
                logits_V = model.eval()(torch.tensor([document[:length]]), use_cache=False).logits[0, -1, : WORDS + 3]
            assert int(logits_V.argmax()) == document[length]


def test_without_bos_the_first_token_is_random_and_plain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    bare = make_tokenizer(WORDS)
    bare.bos_token = None
    firsts = {document[0] for document in ids_of(sample(model, bare, tokens=2000))}
    assert firsts <= set(range(3, WORDS + 3)) | {BOS}
    assert EOS not in firsts
    assert len(firsts) > WORDS // 2


@pytest.mark.parametrize(("top_k", "temperature"), [(None, 1.0), (None, 0.5), (3, 1.0)])
def test_distribution(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, top_k: int | None, temperature: float
) -> None:
    draw = _Draw(model, tokenizer, 0, temperature, top_k)
    logits_V = torch.tensor([2.0, 1.0, 0.0, 0.5, -30.0, float("-inf"), 1.5])
    drawn = Counter(draw._pick(logits_V.expand(20_000, -1)).tolist())
    expected_V = logits_V / temperature
    if top_k is not None:
        expected_V[expected_V < expected_V.topk(top_k).values[-1]] = -torch.inf
    expected_V = expected_V.softmax(dim=0)
    for token, probability in enumerate(expected_V.tolist()):
        assert drawn[token] / 20_000 == pytest.approx(probability, abs=0.015)
        assert probability > 0 or drawn[token] == 0


def test_every_stop_of_the_generation_config_ends_a_document(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.generation_config, "eos_token_id", [EOS, 5, 6])
    for document in ids_of(sample(model, tokenizer)):
        assert not {EOS, 5, 6} & set(document[1:-1])


def test_blocks_of_self(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    loads: list[int] = []

    def load() -> LlamaForCausalLM:
        loads.append(1)
        return model

    def build(seed: int, model_hash: str = "hash") -> object:
        sampler = ModelSampler(load, model_hash, tokenizer, document_length=24, batch_size=8)
        return build_token_blocks(
            parse_data_spec("self"), tokenizer, block_length=16, tokens=160, seed=seed, cache_dir=tmp_path,
            heldout_fraction=0.1, sampler=sampler,
        ).train.tolist()  # fmt: skip

    assert build(0) == build(0)
    assert len(loads) == 1, "the second build comes from the cache and needs no model"
    assert build(1) != build(0)
    build(0, "another")
    assert len(loads) == 3


def test_progress_counts_tokens(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    counted: list[int] = []

    class Counting(SilentProgress):
        @contextmanager
        def stage(self, title: str, total: int | None = None, unit: str = "") -> Iterator[Task]:
            assert (title, total, unit) == ("Sampling text", 300, "tokens")
            yield SimpleNamespace(advance=lambda amount=1, **fields: counted.append(amount))

    documents = sample(model, tokenizer, progress=Counting())
    assert sum(counted) == sum(map(len, ids_of(documents)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"document_length": 65}, "documents of 65 tokens cannot be sampled from a model with a context of 64"),
        ({"document_length": 1}, "documents of 1 tokens cannot be sampled"),
        ({"batch_size": 0}, "cannot sample with batch size 0"),
        ({"temperature": 0.0}, "cannot sample with batch size 8, temperature 0"),
        ({"top_k": 0}, "top_k 0"),
    ],
)
def test_bad_sizes(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        sample(model, tokenizer, **changes)
