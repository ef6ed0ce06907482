"""Text streamed from a Hub dataset, at a commit that is resolved once and recorded."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import NoReturn, cast

import datasets
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]  # of httpx or httpx2

from factorctl.data.account import SourceAccount
from factorctl.data.documents import Document
from factorctl.data.seeded_order import seeded_order
from factorctl.data.spec import DataSpec, HubSource
from factorctl.data.text_field import read_rows
from factorctl.errors import FactorctlError, ResourceError, UsageError, first_cause, in_one_line

SPLIT = "train"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_USE_LOCAL = "give local files; factorize, finetune and profile take `self` as well (text that the model samples)"


def pin_revisions(spec: DataSpec) -> DataSpec:
    """The same spec with every Hub revision replaced by the commit that it names now.

    A revision that already is a commit is kept without asking the Hub, so a cached build needs no network.

    Raises:
        UsageError: no such dataset or revision, or access to it has not been granted.
        ResourceError: the Hub cannot be reached.
    """
    return dataclasses.replace(
        spec, sources=tuple(_pin(source) if isinstance(source, HubSource) else source for source in spec.sources)
    )


def stream_dataset(
    source: HubSource, *, seed: int, text_field: str | None, account: SourceAccount
) -> Iterator[Document]:
    """The documents of the dataset's train split: its files in seeded order, the rows of each in their own order."""
    rows = (
        (f"{source.repo}:{number}", f"Hub dataset '{source.name}', row {number}", row)
        for number, row in enumerate(_rows(source, seed), start=1)
    )
    try:
        yield from read_rows(rows, text_field, account)
    except FactorctlError:
        raise
    except (DatasetsError, HfHubHTTPError, TransportError, OSError, ValueError, RuntimeError) as error:
        _explain(source, error)


def _rows(source: HubSource, seed: int) -> Iterator[Mapping[str, object]]:
    """The rows, shard after shard. `IterableDataset.shuffle` would interleave shards, each version its own way."""
    dataset = datasets.load_dataset(source.repo, source.config, split=SPLIT, streaming=True, revision=source.revision)
    count = dataset.num_shards
    for index in seeded_order([str(index) for index in range(count)], seed):
        yield from cast(Iterator[Mapping[str, object]], dataset.shard(count, int(index)))


def _pin(source: HubSource) -> HubSource:
    if source.revision is not None and _COMMIT.fullmatch(source.revision):
        return source
    try:
        commit = HfApi().dataset_info(source.repo, revision=source.revision).sha
    except (HfHubHTTPError, HFValidationError, TransportError, OSError) as error:
        _explain(source, error)
    return dataclasses.replace(source, revision=commit)


def _explain(source: HubSource, error: Exception) -> NoReturn:
    """Turn what the Hub libraries raise into what happened and the next step."""
    name, reason = source.repo, (str(error).splitlines() or [type(error).__name__])[0]
    page = f"https://huggingface.co/datasets/{name}"
    if isinstance(error, GatedRepoError) or (isinstance(error, DatasetNotFoundError) and "gated" in reason):
        raise UsageError(
            f"Hub dataset '{name}' is gated and this account has no access",
            f"ask for access at {page}, run `hf auth login`, and try again; or {_USE_LOCAL}",
        ) from error
    if isinstance(error, RevisionNotFoundError):
        raise UsageError(
            f"Hub dataset '{name}' has no revision '{source.revision}'", f"see {page}/commits/main"
        ) from error
    if isinstance(error, RepositoryNotFoundError | DatasetNotFoundError | HFValidationError):
        raise UsageError(
            f"'{source.name}' is neither a local path nor a Hub dataset that this account can see",
            f"check the spelling; if it is private, run `hf auth login`; or {_USE_LOCAL}",
        ) from error
    if isinstance(error, OfflineModeIsEnabled):
        raise ResourceError(f"Hub dataset '{name}': offline mode is on", f"unset HF_HUB_OFFLINE, or {_USE_LOCAL}")
    if isinstance(error, TransportError | OSError):
        raise ResourceError(
            f"Hub dataset '{name}' cannot be reached: {in_one_line(first_cause(error))}", _USE_LOCAL
        ) from error
    raise UsageError(
        f"Hub dataset '{source.name}' cannot be streamed from its split '{SPLIT}': {reason}",
        f"name a configuration as user/name:config (see {page}), or {_USE_LOCAL}",
    ) from error
