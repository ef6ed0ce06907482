"""Token blocks: packing, held-out documents, the cache and what can go wrong with it."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.texts import BOS, EOS, WORDS, build, document_text, make_tokenizer, write_documents
from transformers import LlamaConfig, LlamaForCausalLM

from factorctl.data import block_files, building
from factorctl.data.blocks import open_token_blocks
from factorctl.data.documents import Document
from factorctl.data.identity import tokenizer_fingerprint
from factorctl.data.spec import parse_data_spec
from factorctl.data.tokenizing import tokenize_documents
from factorctl.errors import IntegrityError, ResourceError, UsageError
from factorctl.progress import Progress, SilentProgress


@pytest.fixture
def text(tmp_path: Path) -> str:
    return write_documents(tmp_path / "text.jsonl", [5 + n % 23 for n in range(60)])


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock")) if cache.exists() else []


# packing -------------------------------------------------------------------------------------------------------------


def test_documents_are_packed_whole_and_in_order(text: str, cache: Path) -> None:
    blocks = build(text, cache, heldout_fraction=0.0, tokens=96)
    expected = [i for n in range(60) for i in [BOS, *(3 + n + k for k in range(5 + n % 23)), EOS]]
    assert blocks.train.reshape(-1).tolist() == expected[:96]
    assert blocks.train.dtype == np.uint16
    assert (blocks.tokens, blocks.block_length, blocks.documents) == (96, 16, 9)
    assert blocks.heldout.shape == (0, 16)
    assert not blocks.train.flags.writeable


def test_tokens_are_rounded_up_to_whole_blocks(text: str, cache: Path) -> None:
    assert build(text, cache, tokens=97).train.shape == (7, 16)


def test_no_bos_and_wide_vocabulary(text: str, cache: Path) -> None:
    assert build(text, cache, make_tokenizer(bos=False), heldout_fraction=0.0).train[0, :6].tolist() == [
        3,
        4,
        5,
        6,
        7,
        2,
    ]
    assert build(text, cache, make_tokenizer(1 << 16)).train.dtype == np.uint32


def test_positions_restart_at_documents_and_blocks(text: str, cache: Path) -> None:
    blocks = build(text, cache)
    for part, array in (("train", blocks.train), ("heldout", blocks.heldout)):
        rows = np.arange(len(array))[::-1]
        for row, position_L in zip(rows, blocks.position_ids(part, rows), strict=True):  # type: ignore[arg-type]
            position = -1
            for column, token in enumerate(array[row].tolist()):
                position = 0 if token == BOS else position + 1
                assert position_L[column] == position


def test_positions_alone_keep_attention_inside_documents(text: str, cache: Path) -> None:
    """What a model says of a packed document is what it says of the document alone."""
    blocks = build(text, cache)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS + 3, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.from_numpy(blocks.train[:4].astype(np.int64))
    rows = np.arange(4)
    positions = blocks.position_ids("train", rows)
    numbers = np.cumsum((positions == 0) & (np.arange(positions.shape[1]) > 0), axis=1)
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=torch.from_numpy(positions), use_cache=False).logits
        assert numbers.max() > 0
        for row in range(4):
            for number in range(numbers[row].max() + 1):
                inside = torch.from_numpy(numbers[row] == number)
                alone = model(input_ids=ids[row][inside][None], use_cache=False).logits[0]
                torch.testing.assert_close(packed[row][inside], alone, rtol=1e-4, atol=1e-5)


def test_max_document_tokens(text: str, cache: Path) -> None:
    blocks = build(text, cache, max_document_tokens=4)
    assert set(np.diff(blocks.train_starts).tolist()) == {4}


# held-out ------------------------------------------------------------------------------------------------------------


def first_words(array: np.ndarray[Any, Any]) -> set[int]:
    flat = array.reshape(-1).tolist()
    return {after for token, after in pairwise(flat) if token == BOS}


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
def test_heldout_documents_are_others(text: str, cache: Path, fraction: float) -> None:
    blocks = build(text, cache, heldout_fraction=fraction)
    assert blocks.heldout.shape == (max(1, round(10 * fraction)), 16)
    assert blocks.train.shape == (10, 16)
    assert first_words(blocks.train)
    assert first_words(blocks.heldout)
    assert not first_words(blocks.train) & first_words(blocks.heldout)


def test_copies_of_a_document_stay_on_one_side(tmp_path: Path, cache: Path) -> None:
    rows = [json.dumps({"text": document_text(n % 12, 9)}) for n in range(200)]
    (tmp_path / "copies.jsonl").write_text("\n".join(rows))
    blocks = build(str(tmp_path / "copies.jsonl"), cache, tokens=400, heldout_fraction=0.25)
    assert blocks.heldout.size == 112
    assert not first_words(blocks.train) & first_words(blocks.heldout)


def test_every_source_is_held_out_in_proportion(tmp_path: Path, cache: Path) -> None:
    a = write_documents(tmp_path / "a.jsonl", [9] * 300)
    b = write_documents(tmp_path / "b.jsonl", [9] * 300, first=300)
    blocks = build(f"{a}=0.75,{b}=0.25", cache, tokens=1600, heldout_fraction=0.2)
    shares = [source["tokens"] / blocks.tokens for source in blocks.sources]
    heldout = [source["heldout_tokens"] / blocks.heldout.size for source in blocks.sources]
    assert shares == pytest.approx([0.75, 0.25], abs=0.05)
    assert heldout == pytest.approx([0.75, 0.25], abs=0.1)


def test_short_text_still_keeps_a_heldout_block(tmp_path: Path, cache: Path) -> None:
    data = write_documents(tmp_path / "short.jsonl", [9] * 12)
    blocks = build(data, cache, tokens=100_000, heldout_fraction=0.01, allow_fewer=True)
    assert blocks.heldout.shape[0] == 1
    assert blocks.train.shape[0] == 6
    assert not first_words(blocks.train) & first_words(blocks.heldout)


# too little text -----------------------------------------------------------------------------------------------------


def test_too_few_tokens(text: str, cache: Path) -> None:
    with pytest.raises(UsageError) as caught:
        build(text, cache, tokens=65_536)
    assert caught.value.message == (
        "the calibration text gives 1,017 tokens; 65,536 were asked for, and 13,120 more to hold out"
    )
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("give more text, ask for 832 tokens or fewer, or use `self`")
    assert build(text, cache, tokens=65_536, allow_fewer=True).tokens == 832


def test_a_cached_shortage_is_still_an_error(text: str, cache: Path) -> None:
    build(text, cache, tokens=65_536, allow_fewer=True)
    with pytest.raises(UsageError, match="the training text gives 1,017 tokens"):
        build(text, cache, tokens=65_536, purpose="training")


def test_less_than_a_block(tmp_path: Path, cache: Path) -> None:
    data = write_documents(tmp_path / "one.jsonl", [100])
    with pytest.raises(UsageError) as caught:
        build(data, cache, allow_fewer=True)
    assert caught.value.message == (
        f"the calibration text '{data}' gives 102 tokens in 1 document; it takes at least a block of 16 tokens, "
        "and a block of other documents to hold out"
    )
    assert entries(cache) == []


@pytest.mark.parametrize("content", ["", "\n \n", '{"text": " "}\n'])
def test_empty_text(tmp_path: Path, cache: Path, content: str) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(
        UsageError, match=r"the training text '.*empty.jsonl' is empty\nHint: give files that hold text"
    ):
        build(str(path), cache, purpose="training", allow_fewer=True)
    assert entries(cache) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "0 tokens in blocks of 16 cannot be built"),
        ({"block_length": 1}, "160 tokens in blocks of 1 cannot be built"),
        ({"heldout_fraction": 1.0}, "a held-out fraction of 1 is out of range"),
        ({"heldout_fraction": -0.1}, "a held-out fraction of -0.1 is out of range"),
        ({"max_document_tokens": 0}, "documents cannot be cut to 0 tokens"),
    ],
)
def test_bad_sizes(text: str, cache: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(text, cache, **changes)


# cache ---------------------------------------------------------------------------------------------------------------


class Tokenised(Exception):
    """Raised in place of tokenising: the cache was missed."""


@pytest.fixture
def no_tokenising(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise Tokenised

    monkeypatch.setattr(building, "encode_documents", refuse)


def test_cache_hit(text: str, cache: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    first = build(text, cache)
    request.getfixturevalue("no_tokenising")
    again = build(text, cache)
    assert again.fingerprint == first.fingerprint == first.path.name
    np.testing.assert_array_equal(again.train, first.train)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / "text.jsonl").write_bytes(Path(text).read_bytes())
    assert build(str(moved / "text.jsonl"), cache).fingerprint == first.fingerprint


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"tokens": 176}, {"block_length": 8}, {"heldout_fraction": 0.3}, {"max_document_tokens": 9}],
)
def test_other_options_miss(text: str, cache: Path, changes: dict[str, Any], request: pytest.FixtureRequest) -> None:
    build(text, cache)
    request.getfixturevalue("no_tokenising")
    with pytest.raises(Tokenised):
        build(text, cache, **changes)


def test_changed_file_and_tokenizer_miss(text: str, cache: Path, request: pytest.FixtureRequest) -> None:
    build(text, cache)
    request.getfixturevalue("no_tokenising")
    with pytest.raises(Tokenised):
        build(text, cache, make_tokenizer(bos=False))
    content = Path(text).read_text()
    Path(text).write_text(content.replace("w7 ", "w8 ", 1))
    with pytest.raises(Tokenised):
        build(text, cache)
    Path(text).write_text(content)
    build(text, cache)


def test_tokenizer_fingerprint_ignores_the_last_call() -> None:
    tokenizer = make_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    with_padding_token = tokenizer_fingerprint(tokenizer)
    tokenizer(["w1 w2", "w3"], padding=True, truncation=True, max_length=4)
    assert tokenizer_fingerprint(tokenizer) == with_padding_token != before


def test_same_text_gives_the_same_bytes(text: str, tmp_path: Path) -> None:
    first, second = (build(text, tmp_path / name, seed=5) for name in "ab")
    for name in sorted(path.name for path in first.path.iterdir()):
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes(), name


def test_provenance(text: str, cache: Path) -> None:
    (source,) = build(text, cache).sources
    assert source["kind"] == "files"
    assert source["name"] == text
    assert source["files"][0]["name"] == "text.jsonl"
    assert source["files"][0]["bytes"] == Path(text).stat().st_size
    assert (source["tokens"], source["heldout_tokens"]) == (160, 32)


@pytest.mark.parametrize("victim", ["finish", "append", "write_meta", "rename"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_interrupted_build_leaves_nothing(
    text: str, cache: Path, monkeypatch: pytest.MonkeyPatch, victim: str, error: BaseException
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        where: Any = {"write_meta": building, "rename": Path}.get(victim, block_files.BlockWriter)
        patch.setattr(where, victim, fail)
        is_explained = victim == "rename" and isinstance(error, OSError)
        with pytest.raises(ResourceError if is_explained else type(error)):
            build(text, cache)
    assert entries(cache) == []
    assert build(text, cache).tokens == 160


def test_leftover_of_a_killed_build_is_removed(text: str, cache: Path) -> None:
    fingerprint = build(text, cache).path.name
    killed = cache / f".{fingerprint}.partial"
    (cache / fingerprint).rename(killed)
    (killed / "train.npy").write_bytes(b"half")
    assert build(text, cache).tokens == 160
    assert entries(cache) == [fingerprint]


def test_full_disk(text: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(block_files.BlockWriter, "append", fail)
    with pytest.raises(ResourceError, match=r"no space left while writing the token cache"):
        build(text, cache)
    assert entries(cache) == []


@pytest.mark.parametrize("damage", ["no meta", "bad meta", "short array", "missing starts"])
def test_damaged_cache_is_built_again(text: str, cache: Path, damage: str) -> None:
    blocks = build(text, cache)
    expected = blocks.train.tolist()
    if damage == "no meta":
        (blocks.path / "meta.json").unlink()
    elif damage == "bad meta":
        (blocks.path / "meta.json").write_text("{")
    elif damage == "missing starts":
        (blocks.path / "train_starts.npy").unlink()
    else:
        content = (blocks.path / "train.npy").read_bytes()
        (blocks.path / "train.npy").write_bytes(content[:-10])
    with pytest.raises(IntegrityError, match=r"token cache .*\nHint: delete it and run again"):
        open_token_blocks(blocks.path)
    progress = SilentProgress()
    assert build(text, cache, progress=progress).train.tolist() == expected
    assert "it is built again" in progress.notes[0]


def _build_in_child(text: str, cache: Path, start: Any, results: Any) -> None:
    start.wait()
    results.put(build(text, cache).train.tolist())


def test_two_processes_share_one_build(text: str, cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(2), context.Queue()
    children = [context.Process(target=_build_in_child, args=(text, cache, start, results)) for _ in range(2)]
    for child in children:
        child.start()
    first, second = results.get(timeout=60), results.get(timeout=60)
    for child in children:
        child.join(timeout=60)
    assert [child.exitcode for child in children] == [0, 0]
    assert first == second
    assert len(entries(cache)) == 1


# self ----------------------------------------------------------------------------------------------------------------


class FakeSampler:
    """Documents of 8 tokens; counts how often it is asked."""

    document_length = 8

    def __init__(self, fingerprint: str = "model-a") -> None:
        self.fingerprint = fingerprint
        self.asked: list[int] = []

    def __call__(self, *, tokens: int, seed: int, progress: Progress) -> Iterator[Document]:
        self.asked.append(tokens)
        for number in range(-(-tokens // 8)):
            ids = [BOS, *((number + k) % WORDS + 3 for k in range(7))]
            yield Document(f"sampled text {seed} {number}", "self", f"self:{number}", tokens=ids)


def test_self_is_cached_by_model(cache: Path) -> None:
    sampler = FakeSampler()
    blocks = build("self", cache, sampler=sampler)
    assert blocks.tokens == 160
    assert blocks.heldout.size == 32
    assert blocks.train[0, :9].tolist() != blocks.heldout[0, :9].tolist()
    assert set(np.diff(blocks.train_starts).tolist()) == {8}, "no EOS behind a document that was cut at its length"
    assert blocks.sources[0]["kind"] == "self"
    build("self", cache, sampler=sampler)
    assert sampler.asked == [200]
    other = FakeSampler("model-b")
    assert build("self", cache, sampler=other).fingerprint != blocks.fingerprint
    assert other.asked == [200]


def test_self_mixed_with_a_file(text: str, cache: Path) -> None:
    blocks = build(f"self=0.5,{text}=0.5", cache, sampler=FakeSampler())
    assert [source["kind"] for source in blocks.sources] == ["self", "files"]
    assert all(source["tokens"] > 0 for source in blocks.sources)


def test_self_without_sampler(cache: Path) -> None:
    with pytest.raises(UsageError, match="`self` needs the dense model"):
        build("self", cache)


# documents for perplexity, the order of blocks ---------------------------------------------------------------------


def test_tokenize_documents(text: str) -> None:
    documents = tokenize_documents(parse_data_spec(text), make_tokenizer())
    assert len(documents) == 60
    assert documents[3].id == "text.jsonl:4"
    assert documents[3].ids == [BOS, *range(6, 14)]
    limited = tokenize_documents(parse_data_spec(text), make_tokenizer(), max_tokens=20)
    assert [len(document.ids) for document in limited] == [6, 7, 7]


def test_tokenize_empty(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UsageError, match=r"'.*empty.txt' holds no text to evaluate"):
        tokenize_documents(parse_data_spec(str(tmp_path / "empty.txt")), make_tokenizer())
