"""A directory for hostile files with things around it that nobody may touch, and many cases tried in it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from faults.tally import Tally
from hostile import cases
from support.tiny import directory_bytes
from survey import survey

from factorctl.checkpoint.manifest import MANIFEST_NAME
from factorctl.files.hashing import hash_bytes

Read = Callable[[bytes], object]


class Sandbox:
    """A directory to read in, with things around it that nobody may touch."""

    def __init__(self, root: Path, content: Path) -> None:
        self.root, self.inside = root, root / "inside"
        shutil.copytree(content, self.inside)
        (root / "outside.safetensors").write_bytes(b"outside")
        (root / "canary").write_text("sings")
        self.around = self._around()

    def _around(self) -> dict[str, bytes]:
        return {name: data for name, data in directory_bytes(self.root).items() if not name.startswith("inside")}

    def assert_untouched(self) -> None:
        assert self._around() == self.around, "something outside of the directory was written"

    def add_traps(self, suffix: str = "") -> None:
        """Links that lead out, and files that never end."""
        (self.inside / f"link-to-outside{suffix}").symlink_to("../outside.safetensors")
        (self.inside / "link-to-parent").symlink_to("..")
        (self.inside / f"link-to-zeros{suffix}").symlink_to("/dev/zero")
        os.mkfifo(self.inside / f"pipe{suffix}")

    def unsealed_manifest(self) -> bytes:
        """The manifest as a version without seals wrote it, or an attacker: what is changed in it is not noticed."""
        raw = json.loads((self.inside / MANIFEST_NAME).read_bytes())
        raw.pop("sha256")
        return json.dumps(raw).encode()

    def vouch(self, name: str, content: bytes) -> None:
        """Write a file and a manifest that says it is right."""
        (self.inside / name).write_bytes(content)
        raw = json.loads(self.unsealed_manifest())
        record = hash_bytes(content)
        raw["files"][name] = {"sha256": record.sha256, "size": record.size}
        raw["sha256"] = None
        (self.inside / MANIFEST_NAME).write_bytes(json.dumps(raw).encode())


def try_cases(
    read: Read,
    valid: bytes,
    count: int,
    sandbox: Sandbox,
    tally: Tally,
    what: str,
    *,
    seed: str = "",
    least_refused: float = 0.4,
) -> None:
    """Survey `count` cases; every one must be refused by a FactorctlError or do no harm.

    Args:
        least_refused: share of the cases that are hostile in a way that shows.
    """
    assert read(valid) is not False, "the valid file is read"
    found = survey(read, cases(valid, seed or what, count), sandbox.inside)
    tally.add("hostile file", what, tried=found.tried, survived=found.tried - len(found.failures))
    assert not found.failures, f"{len(found.failures)} of {count}:\n" + "\n\n".join(found.failures[:5])
    assert found.tried == count
    assert found.refused > count * least_refused, "most cases are hostile in a way that shows"
