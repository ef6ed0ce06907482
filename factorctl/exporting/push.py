"""Uploading a finished export to the Hugging Face Hub. Nothing is uploaded unless it was asked for."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]  # of httpx or httpx2

from factorctl.errors import ResourceError, UsageError, in_one_line

_UNREACHABLE = (HfHubHTTPError, TransportError, OfflineModeIsEnabled, OSError)


def prepare_push(repo: str, *, private: bool) -> str:
    """Make sure of the repository before hours are spent on what goes there; returns its full id.

    Raises:
        UsageError: not logged in, or no such name can be.
        ResourceError: the hub cannot be reached, or refuses.
    """
    try:
        return str(HfApi().create_repo(repo, private=private, exist_ok=True, repo_type="model").repo_id)
    except HFValidationError:
        raise UsageError(f"--push {repo!r} is no hub id", "for example your-name/model-1R4E2K") from None
    except LocalTokenNotFoundError:
        raise UsageError(f"--push {repo} needs a login", "run `hf auth login`") from None
    except HfHubHTTPError as error:  # itself an HTTPError of the transport: first
        raise ResourceError(
            f"the hub does not take {repo}: {in_one_line(error)}",
            "run `hf auth login` with a token that may write, or export without --push and upload later",
        ) from None
    except _UNREACHABLE as error:
        raise ResourceError(
            f"the hub cannot be reached for {repo}: {in_one_line(error)}",
            "export without --push and upload later with `hf upload`",
        ) from None


def push(directory: Path, repo: str, *, message: str) -> str:
    """Upload every file of a finished export; returns the commit.

    Raises:
        ResourceError: the upload broke off. The export itself is complete.
    """
    try:
        commit = HfApi().upload_folder(
            repo_id=repo, folder_path=directory, repo_type="model", commit_message=message, delete_patterns="*"
        )
    except _UNREACHABLE as error:
        raise ResourceError(
            f"the upload to {repo} broke off: {in_one_line(error)}",
            f"the export in {directory} is complete; upload it with `hf upload {repo} {directory}`",
        ) from None
    return str(commit.oid)
