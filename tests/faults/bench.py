"""Where the verbs are tried: what they read, a fresh place for every run, and what must be true after a fault."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from comparing import LOCK_NAME, comparable, units
from injection import Action, Fate, fate_of
from standins import OUT, without_engines
from support.command_line import Outcome, cli
from support.evaluating import write_tasks
from support.exporting import make_gguf_source
from support.tiny import directory_bytes, factorize_quietly, make_text, weights_only
from verbs import RECIPE, ROWS, Row

from factorctl.checkpoint.manifest import MANIFEST_NAME, check_files, read_manifest
from factorctl.ffn.tuned import forget
from factorctl.files.hashing import hash_value
from factorctl.files.strict_json import read_sealed


class Bench:
    """What the verbs read, and what each makes of it where nothing goes wrong."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.source = make_gguf_source(root / "source", "llama")
        self.text = _documents(make_text(root / "words.txt", words=2000))
        self.tasks = write_tasks(root / "tasks", documents=2)
        self.base = root / "base"
        factorize_quietly(weights_only(self.source, self.base, top_k=2))
        self.kept = {path: directory_bytes(path) for path in (self.source, self.base)}
        self._made: dict[tuple[str, bool], Path] = {}
        self._points: dict[tuple[str, bool], tuple[str, ...]] = {}

    def reads(self, name: str) -> Path:
        """The directory that a verb reads."""
        return self.source if ROWS[name].reads == "source" else self.base

    def command(self, name: str, out: Path, *more: object, older: bool = False) -> list[object]:
        """The command whose result is `out`; with `older`, another result."""
        row = ROWS[name]
        filled = {"source": self.source, "base": self.base, "text": self.text, "tasks": self.tasks, "out": out}
        filled |= {"workspace": out.parent, "recipe": self._recipe(out.name, seed=int(older))}
        options = [str(option).format_map(filled) for option in (*row.options, *row.places)]
        return [row.verb, *options, *((row.older or ()) if older else ()), *more]

    def _recipe(self, name: str, *, seed: int) -> Path:
        path = self.root / f"recipe-{hash_value(name)[:8]}-{seed}.toml"
        texts = {"name": name, "source": str(self.source), "text": str(self.text)}
        written = {key: json.dumps(text, ensure_ascii=False) for key, text in texts.items()}
        path.write_text(RECIPE.format(seed=seed, **written), encoding="utf-8")
        return path

    def made(self, name: str, *, older: bool = False) -> Path:
        """The result of an undisturbed run, made once; with `older`, the one that is to be replaced.

        It is made in this very process, so that children find everything imported.
        """
        if (name, older) not in self._made:
            place = Place.new(self.root / f"straight-{len(self._made)}")
            with place.cache(), without_engines():
                outcome = cli(*self.command(name, place.out, older=older))
            assert outcome.code == 0, outcome.stderr
            self._made[name, older] = place.out
        return self._made[name, older]

    def wanted(self, name: str, *, older: bool = False) -> dict[str, bytes]:
        """Every file of the undisturbed result."""
        made = self.made(name, older=older)
        return comparable(directory_bytes(made), [made])

    def points(self, name: str, *, replaces: bool = False) -> tuple[str, ...]:
        """The write points of a whole run, counted once; with `replaces`, over an older result."""
        if (name, replaces) not in self._points:
            place = self.place(name, Path(tempfile.mkdtemp(dir=self.root)), replaces=replaces)
            fate = place.run()
            assert fate.code == 0, fate.message
            assert place.result() == self.wanted(name), "the same work gives the same bytes"
            self._points[name, replaces] = fate.points
            shutil.rmtree(place.root)
        return self._points[name, replaces]

    def place(self, name: str, root: Path, *, replaces: bool = False, out: Path | None = None) -> Place:
        """A fresh directory for one run of a verb; with `replaces`, an older result stands there.

        Args:
            out: another place for the result than the usual.
        """
        place, wanted = Place.new(root), self.wanted(name)
        more, before, older = (), None, []
        if replaces:
            older = [self.made(name, older=True)]
            more, before = ROWS[name].overwrite, self.wanted(name, older=True)
            shutil.copytree(older[0], place.out)
        command = tuple(self.command(name, out or place.out, *more))
        kept = {self.reads(name): self.kept[self.reads(name)]}
        return Place(root, command, kept, wanted, before, ROWS[name], out, tuple(older))

    def places(
        self, name: str, root: Path, points: Iterable[int], *, replaces: bool = False
    ) -> Iterator[tuple[int, Place]]:
        """A fresh place for each of these write points, removed when the next is asked for."""
        for point in points:
            place = self.place(name, root / f"{point}", replaces=replaces)
            yield point, place
            shutil.rmtree(place.root)


@dataclass(frozen=True)
class Place:
    """A directory of its own for one command: its result, its cache, and what it must not change."""

    root: Path
    arguments: tuple[object, ...] = ()
    kept: dict[Path, dict[str, bytes]] = field(default_factory=dict)
    """What is read: it must stay as it is."""
    wanted: dict[str, bytes] | None = None
    before: dict[str, bytes] | None = None
    """The older result's files, where one stands there."""
    row: Row | None = None
    elsewhere: Path | None = None
    """Where the result goes, if not to the usual place."""
    copied: tuple[Path, ...] = ()
    """Where the older result was made."""

    @classmethod
    def new(cls, root: Path) -> Place:
        (root / "runs").mkdir(parents=True)
        return cls(root)

    @property
    def out(self) -> Path:
        return self.elsewhere or self.root / "runs" / OUT

    def result(self) -> dict[str, bytes]:
        """Every file of the result, to be compared with another run's."""
        return comparable(directory_bytes(self.out), [self.out, *self.copied])

    @contextmanager
    def cache(self) -> Iterator[None]:
        """A cache that nothing has filled yet."""
        with mock.patch.dict(os.environ, FACTORCTL_CACHE=str(self.root / "cache")):
            forget()
            yield

    def run(self, action: Action | None = None, *more: object, prepare: Callable[[], None] = lambda: None) -> Fate:
        """The command in a child, `action` ahead of each of its write points."""

        def command() -> Outcome:
            prepare()
            return cli(*self.arguments, *more)

        with self.cache(), without_engines():
            return fate_of(command, self.root, action)

    def finish(self) -> Fate:
        """The same command again, undisturbed; where it says that going on takes an option, with that."""
        assert self.row is not None
        fate = self.run()
        if fate.code == 2 and self.row.go_on and self.row.go_on[0] in fate.message:
            fate = self.run(None, *self.row.go_on)
        return fate

    def assert_nothing_lost(self) -> None:
        """What was read is untouched; what stands under the result's name is the old one or the new one, whole.

        An artefact is one thing, and either; of reports each file is.
        """
        assert self.wanted is not None
        assert self.row is not None
        for path, files in self.kept.items():
            assert directory_bytes(path) == files, "the previous artefact changed"
        found, old, new = (units(files) for files in (self.result(), self.before or {}, self.wanted))
        for name, unit in found.items():
            assert unit in (old.get(name), new.get(name)), f"{name} is neither the old nor the new: {sorted(unit)}"
        assert old.keys() <= found.keys(), "what stood there is gone"
        assert found or self.row.repeats or not self.out.exists(), "there is a result with nothing in it"
        for manifest in (*self.root.glob(f"runs/[!.]*/{MANIFEST_NAME}"), *self.out.glob(f"[!.]*/{MANIFEST_NAME}")):
            assert_whole(manifest.parent)
        if (self.out / LOCK_NAME).exists():
            read_sealed(self.out / LOCK_NAME)

    def assert_finished(self) -> None:
        """The same command, run again, ends with the bytes of a run that nothing disturbed."""
        assert self.row is not None
        is_done = self.before is None and self.out.exists() and not self.row.repeats
        fate = self.finish()
        if is_done:
            assert fate.code == 2
            assert f"{self.out} exists" in fate.message or f"{self.out} is finished" in fate.message, fate.message
        else:
            assert fate.code == 0, fate.message
        assert self.result() == self.wanted, "other bytes than without the fault"


def assert_whole(artefact: Path) -> None:
    """Every file of an artefact is what its manifest says."""
    manifest = read_manifest(artefact)
    assert set(check_files(artefact, manifest)) == manifest.files.keys()


def _documents(text: Path) -> Path:
    """The paragraphs of a text as documents, one a line."""
    paragraphs = text.read_text(encoding="utf-8").split("\n\n")
    lines = text.with_suffix(".jsonl")
    lines.write_text("".join(json.dumps({"text": paragraph}) + "\n" for paragraph in paragraphs), encoding="utf-8")
    return lines
