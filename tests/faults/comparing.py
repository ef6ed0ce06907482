"""When two runs of the same work gave the same: byte for byte, but for what a report says of the run itself.

Checkpoints and exports hold no times and no places, and are compared as they are. Reports say where they lie, how they
were called, how long it took and how much memory there was, and a recipe's lock holds such reports: here, and nowhere
else, is what is left out of them.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path, PurePosixPath

from factorctl.checkpoint.manifest import MANIFEST_NAME
from factorctl.files.strict_json import SEAL, dump_json

LOCK_NAME = "recipe.lock.json"
REPORTS = {
    "results.json", "eval.md", "profile.json", "frontier.json", "report.html", "metrics.jsonl", "try.json", LOCK_NAME,
}  # fmt: skip
"""Files that may say how a run went."""
CIRCUMSTANCES = (
    "seconds", "tokens_per_second", "peak_rss_bytes", "peak_memory_bytes", "memory_bytes", "computed", "reused",
    "resume", "command", "cache_file",
)  # fmt: skip
"""Their fields that do."""
_QUOTE = '(?:"|&quot;)'
_FIELD = re.compile(rf"({_QUOTE}(?:{'|'.join(CIRCUMSTANCES)}){_QUOTE}:) (?:{_QUOTE}.*?{_QUOTE}(?=[,\n}}])|[^,\n}}]+)")
_COMMAND = re.compile(r"```sh\n.*?```", re.DOTALL)
"""The same in Markdown."""
_QUOTED_PLACE = re.compile(r"'((?:OUT|WORKSPACE)[^']*)'")
"""A place in a command to type next: quoted for the shell where its name needs it."""


def comparable(files: Mapping[str, bytes], outs: Iterable[Path]) -> dict[str, bytes]:
    """The files of a result, of the reports only what any run of the same work would say.

    Args:
        outs: where the result lies or, of a copy, was made.
    """
    return {
        name: _comparable(name, content, files, outs) if PurePosixPath(name).name in REPORTS else content
        for name, content in files.items()
    }


def _comparable(name: str, content: bytes, files: Mapping[str, bytes], outs: Iterable[Path]) -> bytes:
    text = (_lock(content, files) if name == LOCK_NAME else content).decode()
    for out in outs:
        for path, stand_in in ((out, "OUT"), (out.parent, "WORKSPACE")):
            for spelt in _spellings(str(path)):
                text = text.replace(spelt, stand_in)
    text = _QUOTED_PLACE.sub(r"\1", text)
    return _COMMAND.sub("", _FIELD.sub(r"\1 _", text)).encode()


def _spellings(path: str) -> list[str]:
    """A path as text, JSON and HTML write it, the longest first."""
    plain = {path, json.dumps(path)[1:-1], json.dumps(path, ensure_ascii=False)[1:-1]}
    return sorted({*plain, *map(html.escape, plain)}, key=len, reverse=True)


def _lock(content: bytes, files: Mapping[str, bytes]) -> bytes:
    """A recipe's lock; the hash of what a stage gave, a report maybe, becomes whether it is that of a file here."""
    lock = json.loads(content)
    lock.pop(SEAL)
    here = {sha256(found).hexdigest() for found in files.values()}
    for entry in lock["stages"].values():
        entry["evidence"] = entry.get("evidence") in here
    return dump_json(lock)


def units(files: Mapping[str, bytes]) -> dict[str, dict[str, bytes]]:
    """What appears at once, by name: a directory with a manifest, or a single file.

    Left out, where they lie in no artefact: hidden files and what a training run keeps, both of work in progress, and a
    recipe's lock, which grows stage by stage.
    """
    artefacts = {PurePosixPath(name).parent for name in files if PurePosixPath(name).name == MANIFEST_NAME}
    found: dict[str, dict[str, bytes]] = {}
    for name, content in files.items():
        path = PurePosixPath(name)
        home = next((parent for parent in path.parents if parent in artefacts), None)
        if home is not None or not any(_is_work(part) for part in path.parts):
            found.setdefault(str(home or path), {})[name] = content
    return found


def _is_work(part: str) -> bool:
    return part.startswith(".") or part.endswith(".training") or part == LOCK_NAME
