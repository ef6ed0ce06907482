"""The verbs that write, one row each: how to run it, what it reads, what stood there before, what comes out."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from export_support import make_gguf_source
from helpers import directory_bytes, factorize_quietly, make_text, weights_only
from helpers_cli import Outcome, cli
from injection import Action, Fate, fate_of

from factorctl.checkpoint.manifest import MANIFEST_NAME, check_files, read_manifest
from factorctl.checkpoint.publishing import write_file
from factorctl.exporting import gguf_writer
from factorctl.exporting.jobs import Verified
from factorctl.exporting.safetensors_writer import SafetensorsWriter
from factorctl.pipeline import finetune as finetune_pipeline

OUT = "out"
"""The name that every run gives its result, so that no byte differs for its name."""


@dataclass(frozen=True)
class Row:
    """A verb with options that make it write all that it can write."""

    verb: str
    reads: str
    """Which artefact of the bench it reads: `source` or `base`."""
    options: tuple[object, ...]
    older: tuple[object, ...]
    """Options that make another result, which stands there already and is to be replaced."""
    go_on: tuple[str, ...] = ()
    """What goes on after a stop, where the same command alone refuses to."""


ROWS: dict[str, Row] = {
    "factorize": Row(
        "factorize", "source", ("--experts", 4, "--strategy", "permuted", "--router", "random"), ("--seed", 1)
    ),
    "factorize, calibrated": Row(
        "factorize",
        "source",
        (
            *("--experts", 4, "--strategy", "permuted", "--calibration", "TEXT", "--calibration-tokens", 1024),
            *("--shared-fraction", 0.25, "--scale", "fitted", "--refit"),
        ),
        ("--seed", 1),
    ),
    "finetune": Row(
        "finetune",
        "base",
        (
            *("--data", "TEXT", "--tokens", 256, "--block-length", 32, "--batch-tokens", 64, "--micro-batch", 2),
            *("--heldout-tokens", 64, "--save-every", 128),
        ),
        ("--seed", 1),
        go_on=("--resume",),
    ),
    "export hf": Row("export", "base", ("--to", "hf"), ("--dtype", "bfloat16")),
    "export gguf": Row("export", "base", ("--to", "gguf"), ("--quant", "q8_0")),
    "export dense": Row("export", "base", ("--to", "dense"), ("--dtype", "bfloat16")),
}
"""Name -> row. A new verb that writes is one more row."""


class Bench:
    """What the verbs read, and what each makes of it where nothing goes wrong."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.source = make_gguf_source(root / "source", "llama")
        self.text = _documents(make_text(root / "words.txt", words=2000))
        self.base = root / "base"
        factorize_quietly(weights_only(self.source, self.base, top_k=2))
        self._made: dict[tuple[str, bool], Path] = {}
        self._points: dict[tuple[str, bool], tuple[str, ...]] = {}

    def reads(self, name: str) -> Path:
        """The directory that a verb reads."""
        return self.source if ROWS[name].reads == "source" else self.base

    def command(self, name: str, out: Path, *more: object) -> list[object]:
        row = ROWS[name]
        options = [self.text if option == "TEXT" else option for option in row.options]
        return [row.verb, self.reads(name), *options, "--device", "cpu", "--out", out, "--workspace", out.parent, *more]

    def made(self, name: str, *, older: bool = False) -> Path:
        """The result of an undisturbed run, made once; with `older`, the one that is to be replaced.

        It is made in this very process, so that children find everything imported.
        """
        if (name, older) not in self._made:
            place = Place.new(self.root / f"straight-{len(self._made)}")
            with place.cache(), without_engines():
                outcome = cli(*self.command(name, place.out, *(ROWS[name].older if older else ())))
            assert outcome.code == 0, outcome.stderr
            self._made[name, older] = place.out
        return self._made[name, older]

    def wanted(self, name: str) -> dict[str, bytes]:
        """Every file of the undisturbed result."""
        return directory_bytes(self.made(name))

    def points(self, name: str, *, replaces: bool = False) -> tuple[str, ...]:
        """The write points of a whole run, counted once; with `replaces`, over an older result."""
        if (name, replaces) not in self._points:
            place = self.place(name, self.root / f"counted-{len(self._points)}", replaces=replaces)
            fate = place.run()
            assert fate.code == 0, fate.message
            assert directory_bytes(place.out) == self.wanted(name), "the same work gives the same bytes"
            self._points[name, replaces] = fate.points
            shutil.rmtree(place.root)
        return self._points[name, replaces]

    def place(self, name: str, root: Path, *, replaces: bool = False) -> Place:
        """A fresh directory for one run of a verb; with `replaces`, an older result stands there."""
        wanted = self.wanted(name)
        place = Place.new(root)
        more: tuple[object, ...] = ()
        if replaces:
            shutil.copytree(self.made(name, older=True), place.out)
            more = ("--overwrite",)
        before = directory_bytes(place.out) if replaces else None
        return Place(root, self.reads(name), tuple(self.command(name, place.out, *more)), wanted, before, ROWS[name])


@dataclass(frozen=True)
class Place:
    """A directory of its own for one command: its result, its cache, and what it must not change."""

    root: Path
    reads: Path = Path()
    arguments: tuple[object, ...] = ()
    wanted: dict[str, bytes] | None = None
    before: dict[str, bytes] | None = None
    """The older result's files, where one stands there."""
    row: Row | None = None

    @classmethod
    def new(cls, root: Path) -> Place:
        (root / "runs").mkdir(parents=True)
        return cls(root)

    @property
    def out(self) -> Path:
        return self.root / "runs" / OUT

    @contextmanager
    def cache(self) -> Iterator[None]:
        """A cache that nothing has filled yet."""
        with mock.patch.dict(os.environ, FACTORCTL_CACHE=str(self.root / "cache")):
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

    def assert_nothing_lost(self, kept: dict[str, bytes]) -> None:
        """What was read is untouched; what stands under the result's name is the old one or the new one, whole."""
        assert directory_bytes(self.reads) == kept, "the previous artefact changed"
        if self.before is not None or self.out.exists():
            found = directory_bytes(self.out)
            assert found in (self.before, self.wanted), f"neither the old nor the new result: {sorted(found)}"
        for manifest in self.root.glob(f"runs/[!.]*/{MANIFEST_NAME}"):
            assert_whole(manifest.parent)

    def assert_finished(self) -> None:
        """The same command, run again, ends with the bytes of a run that nothing disturbed."""
        is_done = self.before is None and self.out.exists()
        fate = self.finish()
        if is_done:
            assert fate.code == 2
            assert f"{self.out} exists" in fate.message or f"{self.out} is finished" in fate.message, fate.message
        else:
            assert fate.code == 0, fate.message
        assert self.wanted is not None
        assert directory_bytes(self.out) == self.wanted, "other bytes than without the fault"


def assert_whole(artefact: Path) -> None:
    """Every file of an artefact is what its manifest says."""
    manifest = read_manifest(artefact)
    assert set(check_files(artefact, manifest)) == manifest.files.keys()


@contextmanager
def without_engines() -> Iterator[None]:
    """No stock engine is started to compare an export and no picture is drawn: seconds each, and no write of ours."""

    def draw(run: Path, *_: object) -> Path:
        write_file(run / "training.png", b"a picture")
        return run / "training.png"

    with (
        mock.patch.object(SafetensorsWriter, "verify", return_value=Verified("nothing", None)),
        mock.patch.object(gguf_writer, "has_llama_cpp", return_value=False),
        mock.patch.object(finetune_pipeline, "draw_training", draw),
    ):
        yield


def sampled(points: Sequence[str], *, pieces: int, calls: int = 1) -> list[int]:
    """Numbers of the points to try: every `calls`-th system call, every `pieces`-th piece of a file."""
    numbered = list(enumerate(points))
    writes = [number for number, name in numbered if name.startswith("write ")]
    others = [number for number, name in numbered if not name.startswith("write ")]
    return sorted([*writes[::pieces], *others[::calls]])


def _documents(text: Path) -> Path:
    """The paragraphs of a text as documents, one a line."""
    paragraphs = text.read_text(encoding="utf-8").split("\n\n")
    lines = text.with_suffix(".jsonl")
    lines.write_text("".join(json.dumps({"text": paragraph}) + "\n" for paragraph in paragraphs), encoding="utf-8")
    return lines
