"""Documents of several sources in one deterministic stream, in the shares that the user asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from factorctl.data.account import SourceAccount, open_accounts
from factorctl.data.documents import Document
from factorctl.data.hub import stream_dataset
from factorctl.data.local_files import read_file
from factorctl.data.seeded_order import seeded_order
from factorctl.data.spec import DataSpec, FileSource, HubSource, TextSource
from factorctl.errors import UsageError
from factorctl.progress import Progress, SilentProgress


def iter_documents(
    spec: DataSpec,
    *,
    seed: int,
    sampled: Iterator[Document] | None = None,
    accounts: Mapping[str, SourceAccount] | None = None,
    progress: Progress | None = None,
) -> Iterator[Document]:
    """Every document of `spec`, the same for the same arguments.

    Sources are mixed by text, not by count of documents: the next document comes from the source whose characters
    so far are furthest below its weight, so at any moment the shares are right to within one document. A source that
    runs out is noted and the others go on. The files of a source come in seeded order, the documents of a file in
    their own, streamed.

    Args:
        sampled: the documents of `self`, for a spec that names it.
        accounts: where fields and omissions are kept, by the source's name; the caller closes them.

    Raises:
        UsageError, IntegrityError, ResourceError: as the readers do; UsageError if `self` is named and not given.
    """
    progress = progress or SilentProgress()
    accounts = open_accounts(spec, progress) if accounts is None else accounts
    streams = [_stream(source, spec.text_field, seed, sampled, accounts[source.name]) for source in spec.sources]
    taken = [0.0] * len(streams)  # characters over weight
    open_streams = list(range(len(streams)))
    while open_streams:
        index = min(open_streams, key=lambda i: (taken[i], i))
        document = next(streams[index], None)
        if document is None:
            open_streams.remove(index)
            if open_streams:
                progress.note(f"'{spec.sources[index].name}' has no more text: the other sources go on without it")
            continue
        taken[index] += max(1, len(document.text)) / spec.weights[index]
        yield document


def _stream(
    source: TextSource,
    text_field: str | None,
    seed: int,
    sampled: Iterator[Document] | None,
    account: SourceAccount,
) -> Iterator[Document]:
    if isinstance(source, FileSource):
        return _stream_files(source, text_field, seed, account)
    if isinstance(source, HubSource):
        return stream_dataset(source, seed=seed, text_field=text_field, account=account)
    if sampled is None:
        raise UsageError("`self` needs the dense model to sample from, and none is at hand here", "give text instead")
    return sampled


def _stream_files(source: FileSource, text_field: str | None, seed: int, account: SourceAccount) -> Iterator[Document]:
    for name in seeded_order(source.files, seed):
        yield from read_file(source.root / name, name, account, text_field)
