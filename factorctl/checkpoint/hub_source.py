"""Fetching a checkpoint from the Hugging Face hub: resumable, without pickles, with the commit resolved."""

from __future__ import annotations

import errno
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]  # of httpx or httpx2

from factorctl.checkpoint.aliases import ALIASES
from factorctl.errors import ResourceError, UsageError, did_you_mean, first_cause, in_one_line
from factorctl.progress import Progress

WANTED_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "README.md")
UNWANTED_FILES = ("[!a]*/*", "a[!d]*/*", "ad[!d]*/*", "consolidated*.safetensors")
"""Other formats of the same weights, which some repositories carry beside them: every directory but those that begin
with `add`, as additional_chat_templates does."""


def download_snapshot(repo: str, *, revision: str | None, progress: Progress) -> Path:
    """Local snapshot directory of `repo`; its name is the resolved commit.

    Raises:
        UsageError: no such repository or revision, or access is gated.
        ResourceError: the hub cannot be reached and nothing is cached.
    """
    try:
        with progress.stage(f"Fetching {repo}"):
            return Path(
                snapshot_download(
                    repo,
                    revision=revision,
                    allow_patterns=list(WANTED_FILES),
                    ignore_patterns=list(UNWANTED_FILES),
                )
            )
    except HFValidationError:
        raise UsageError(f"{repo!r} is no hub id", "for example HuggingFaceTB/SmolLM2-135M") from None
    except GatedRepoError:
        raise UsageError(
            f"{repo} is gated", "accept its terms on its hub page, then run `hf auth login` and try again"
        ) from None
    except RepositoryNotFoundError:
        raise UsageError(
            f"the hub has no model {repo}, or it is private",
            f"check the spelling, or run `hf auth login`{_close_alias(repo)}",
        ) from None
    except RevisionNotFoundError:
        raise UsageError(
            f"{repo} has no revision {revision}", "give a branch, tag or commit of that repository"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, TransportError, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"no space left while fetching {repo}", "free some disk space, or set HF_HOME to a larger disk"
            ) from None
        if isinstance(error, OfflineModeIsEnabled) or (HF_HUB_OFFLINE and isinstance(error, LocalEntryNotFoundError)):
            raise ResourceError(
                f"{repo} is not in the hub's local cache, and HF_HUB_OFFLINE forbids to ask for it",
                "unset HF_HUB_OFFLINE, give a local directory, or try the model `demo`, which comes with a package",
            ) from None
        raise ResourceError(
            f"the hub cannot be reached for {repo}: {in_one_line(first_cause(error))}",
            "run again when it is (finished files are kept), give a local directory, or try the model `demo`, "
            "which comes with a package",
        ) from None


def _close_alias(repo: str) -> str:
    hint = did_you_mean(repo, ALIASES)
    return f"; {hint.partition(' Known')[0]}" if hint.startswith("did you mean") else ""
