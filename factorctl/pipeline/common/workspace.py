"""Where artefacts and reports go, and where the newest checkpoint is."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from factorctl.checkpoint.manifest import MANIFEST_NAME, is_artefact
from factorctl.errors import IntegrityError, UsageError
from factorctl.files.publishing import refuse_impossible_name
from factorctl.files.strict_json import read_json_object

CLOCK_TOLERANCE = 60
"""Seconds by which the clocks of machines that share a directory may differ."""


def output_path(out: Path | None, workspace: Path, model: str, suffix: str) -> Path:
    """`out`, or a name in the workspace made of the model's and what was done to it."""
    if out is not None:
        return out.expanduser()
    path = Path(model).expanduser()
    named = path.resolve() if os.path.exists(path) else Path(model.removeprefix("pypi:"))  # "." has a name then
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", named.name).strip("-.") or "model"
    return workspace / f"{stem.removesuffix('.gguf')}-{suffix}"


def report_directory(out: Path | None, workspace: Path, model: str, suffix: str) -> Path:
    """`output_path` for a report and the finished parts of it.

    Raises:
        UsageError: a file or a checkpoint is there, or the name is too long.
    """
    path = output_path(out, workspace, model, suffix)
    refuse_impossible_name(path)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file, not a directory", "choose another --out")
    if is_artefact(path):
        raise UsageError(f"{path} is a checkpoint: reports do not go into one", "choose another --out")
    return path


def refuse_directory(option: str, file: Path | None, name: str) -> None:
    """Find out before anything is measured that a report could not be written after it.

    Args:
        name: how the file may be called.

    Raises:
        UsageError: a directory stands where the file is to go.
    """
    if file is not None and os.path.isdir(file):
        raise UsageError(f"{option} {file} is a directory", f"name a file: {option} {file / name}")


def newest_checkpoint(workspace: Path, *, kind: str = "native") -> Path:
    """The complete artefact of that kind that was finished last, in the workspace or in a recipe's directory there.

    Raises:
        UsageError: there is none, or a clock that was wrong hides which one it is.
    """
    named = [path for depth in ("*", "*/*") for path in workspace.glob(f"{depth}/{MANIFEST_NAME}")]
    shown = [path for path in named if not any(part.startswith(".") for part in path.relative_to(workspace).parts)]
    wanted = [path for path in shown if path.is_file() and _may_be(kind, path)]
    found = sorted(wanted, key=lambda path: path.stat().st_mtime_ns)
    if len(found) > 1 and (finished := found[-1].stat().st_mtime) > time.time() + CLOCK_TOLERANCE:
        raise UsageError(
            f"{found[-1].parent} is dated {time.ctime(finished)}, in the future: which checkpoint is the newest cannot "
            "be told",
            "name the checkpoint, and look at the clock of this machine",
        )
    if found:
        return found[-1].parent
    raise UsageError(
        f"no checkpoint was named and {workspace} holds none",
        f"make one with `factorctl factorize demo --experts 4 --workspace {workspace}`, or name a checkpoint directory",
    )


def _may_be(kind: str, manifest: Path) -> bool:
    """Whether it is of that kind, or damaged: rather than take an older one, whoever opens it says what is wrong."""
    try:
        return read_json_object(manifest).get("kind") == kind
    except IntegrityError:
        return True
