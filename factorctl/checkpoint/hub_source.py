"""Fetching a checkpoint from the Hugging Face hub: resumable, without pickles, with the commit resolved."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]  # of httpx or httpx2

from factorctl.errors import ResourceError, UsageError
from factorctl.progress import Progress

WANTED_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")


def download_snapshot(repo: str, *, revision: str | None, progress: Progress) -> Path:
    """Local snapshot directory of `repo`; its name is the resolved commit.

    Raises:
        UsageError: no such repository or revision, or access is gated.
        ResourceError: the hub cannot be reached and nothing is cached.
    """
    try:
        with progress.stage(f"Fetching {repo}"):
            return Path(snapshot_download(repo, revision=revision, allow_patterns=list(WANTED_FILES)))
    except GatedRepoError:
        raise UsageError(
            f"{repo} is gated", "accept its terms on its hub page, then run `hf auth login` and try again"
        ) from None
    except RepositoryNotFoundError:
        raise UsageError(
            f"the hub has no model {repo}, or it is private", "check the spelling, or run `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise UsageError(
            f"{repo} has no revision {revision}", "give a branch, tag or commit of that repository"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, TransportError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ResourceError(
            f"the hub cannot be reached for {repo}: {reason}",
            "run again when it is (finished files are kept), give a local directory, or try the model `demo`, "
            "which comes with a package",
        ) from None
