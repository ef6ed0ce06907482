"""Hub datasets against a fake Hub: what is asked of it, what is recorded, and what each failure says."""

from __future__ import annotations

import importlib
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import errors
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from support.texts import build, document_text

from factorctl.data import hub
from factorctl.data.account import SourceAccount
from factorctl.data.hub import pin_revisions, stream_dataset
from factorctl.data.mixing import iter_documents
from factorctl.data.spec import HubSource, parse_data_spec
from factorctl.errors import ResourceError, UsageError
from factorctl.progress import SilentProgress

httpx = importlib.import_module(errors.Response.__module__.split(".")[0])
"""The HTTP library of the installed huggingface_hub: httpx, or httpx2 since 2.0."""
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = [{"id": str(n), "text": f"document {n}"} for n in range(40)]


class FakeHub:
    """Answers for HfApi and datasets.load_dataset, and remembers the questions."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.asked: list[tuple[Any, ...]] = []
        self.failure: Exception | None = None

    def dataset_info(self, repo: str, revision: str | None = None) -> SimpleNamespace:
        self.asked.append(("info", repo, revision))
        if self.failure is not None:
            raise self.failure
        return SimpleNamespace(sha=COMMIT)

    def load_dataset(self, repo: str, config: str | None, **options: Any) -> IterableDataset:
        self.asked.append(("load", repo, config, options))
        if self.failure is not None:
            raise self.failure
        return Dataset.from_list(self.rows).to_iterable_dataset(num_shards=min(4, len(self.rows)))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(ROWS)
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    monkeypatch.setattr(hub.datasets, "load_dataset", fake.load_dataset)
    return fake


def answer(status: int) -> Any:
    return httpx.Response(status, request=httpx.Request("GET", "https://example.invalid"))


def test_revision_is_resolved_to_a_commit(fake: FakeHub) -> None:
    (source,) = pin_revisions(parse_data_spec("user/name:en@v1")).sources
    assert source == HubSource("user/name:en@v1", "user/name", "en", COMMIT)
    assert fake.asked == [("info", "user/name", "v1")]


def test_a_commit_needs_no_network(fake: FakeHub) -> None:
    spec = parse_data_spec(f"user/name@{COMMIT}")
    assert pin_revisions(spec) == spec
    assert fake.asked == []


def test_streaming(fake: FakeHub) -> None:
    spec = pin_revisions(parse_data_spec("user/name:en"))
    documents = list(iter_documents(spec, seed=0))
    assert fake.asked[-1] == (
        "load", "user/name", "en", {"split": "train", "streaming": True, "revision": COMMIT},
    )  # fmt: skip
    assert sorted(document.text for document in documents) == sorted(row["text"] for row in ROWS)
    assert documents[0].id == "user/name:1"
    assert documents[0].source == "user/name:en"
    texts = [document.text for document in documents]
    assert texts == [document.text for document in iter_documents(spec, seed=0)]
    orders = [[document.text for document in iter_documents(spec, seed=seed)] for seed in range(1, 6)]
    assert any(order != texts for order in orders), "files come in seeded order"
    numbers = [int(text.split()[1]) for text in texts]
    assert all(b == a + 1 for a, b in pairwise(numbers) if b % 10), "rows keep their order"


def test_text_field(fake: FakeHub) -> None:
    fake.rows = [{"title": "a", "body": "b"}, {"title": "c", "body": "d"}]
    source = HubSource("u/n", "u/n", None, COMMIT)
    account = SourceAccount("u/n", SilentProgress())
    documents = stream_dataset(source, seed=0, text_field="body", account=account)
    assert sorted(document.text for document in documents) == ["b", "d"]
    assert account.record == {"text": ["field 'body'"]}
    with pytest.raises(UsageError, match=r"Hub dataset 'u/n', row 1 has no field 'text'"):
        list(stream_dataset(source, seed=0, text_field=None, account=account))


def test_cached_blocks_of_a_commit_need_no_hub(fake: FakeHub, tmp_path: Path) -> None:
    fake.rows = [{"text": document_text(n, 9)} for n in range(60)]
    blocks = build(f"user/name@{COMMIT}", tmp_path)
    assert blocks.sources[0]["revision"] == COMMIT
    fake.failure = httpx.ConnectError("no route")
    assert build(f"user/name@{COMMIT}", tmp_path).fingerprint == blocks.fingerprint


@pytest.mark.parametrize(
    ("failure", "kind", "message", "hint"),
    [
        (GatedRepoError("gated", response=answer(403)), UsageError,
         "Hub dataset 'user/name' is gated and this account has no access", "run `hf auth login`"),
        (RepositoryNotFoundError("404", response=answer(404)), UsageError,
         "'user/name:en@v1' is neither a local path nor a Hub dataset that this account can see", "give local files"),
        (RevisionNotFoundError("404", response=answer(404)), UsageError,
         "Hub dataset 'user/name' has no revision 'v1'", "https://huggingface.co/datasets/user/name/commits/main"),
        (HfHubHTTPError("503 busy", response=answer(503)), ResourceError,
         "Hub dataset 'user/name' cannot be reached: 503 busy", "give local files; factorize"),
        (httpx.ConnectError("Name or service not known"), ResourceError,
         "Hub dataset 'user/name' cannot be reached: Name or service not known", "give local files"),
        (OfflineModeIsEnabled("offline"), ResourceError,
         "Hub dataset 'user/name': offline mode is on", "unset HF_HUB_OFFLINE"),
    ],
)  # fmt: skip
def test_resolving_fails(fake: FakeHub, failure: Exception, kind: type[Exception], message: str, hint: str) -> None:
    fake.failure = failure
    with pytest.raises(kind) as caught:
        pin_revisions(parse_data_spec("user/name:en@v1"))
    assert caught.value.message == message  # type: ignore[attr-defined]
    assert hint in caught.value.hint  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (DatasetNotFoundError("Dataset 'user/name' doesn't exist"), UsageError, "is neither a local path nor"),
        (DatasetNotFoundError("Dataset 'user/name' is a gated dataset on the Hub."), UsageError, "is gated"),
        (ConnectionError("Couldn't reach 'user/name' on the Hub"), ResourceError, "cannot be reached: Couldn't reach"),
        (ValueError("BuilderConfig 'en' not found. Available: ['de']"), UsageError,
         "cannot be streamed from its split 'train': BuilderConfig 'en' not found. Available: ['de']"),
        (RuntimeError("Dataset scripts are no longer supported"), UsageError,
         "cannot be streamed from its split 'train': Dataset scripts are no longer supported"),
    ],
)  # fmt: skip
def test_streaming_fails(fake: FakeHub, failure: Exception, kind: type[Exception], message: str) -> None:
    fake.failure = failure
    source = HubSource("user/name:en", "user/name", "en", COMMIT)
    with pytest.raises(kind) as caught:
        list(stream_dataset(source, seed=0, text_field=None, account=SourceAccount(source.name, SilentProgress())))
    assert message in caught.value.message  # type: ignore[attr-defined]
    assert caught.value.hint  # type: ignore[attr-defined]
