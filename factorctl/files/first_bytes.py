"""What a file is, by its first bytes: names are given by people, and a failed download keeps the name."""

from __future__ import annotations

from pathlib import Path

from factorctl.errors import IntegrityError, UsageError

GGUF_MAGIC = b"GGUF"
_LFS_POINTER = b"version https://git-lfs"
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_MARKUP = (b"<!DOCTYPE", b"<!doctype", b"<html", b"<?xml", b"<Error")


def is_gguf(path: Path) -> bool:
    """Whether `path` is a regular file that begins as GGUF files do."""
    return path.is_file() and first_bytes(path).startswith(GGUF_MAGIC)


def first_bytes(path: Path) -> bytes:
    """Enough of the file to tell what it is."""
    with path.open("rb") as file:
        return file.read(64)


def looks_like(path: Path) -> str | None:
    """What the file seems to be, in words that follow "is"; None where its first bytes do not tell."""
    start = first_bytes(path)
    if not start:
        return "an empty file"
    if _is_safetensors(start):  # before the others: a header of 128 bytes, or 384, begins like a pickle
        return "a safetensors file"
    if start.startswith(GGUF_MAGIC):
        return "a GGUF file"
    if start.startswith(_LFS_POINTER):
        return "a git-lfs pointer, not the file that it points to"
    if start.startswith(_ZIP):
        return "a zip archive, as PyTorch's pickled weights and wheels are"
    if start.startswith(_PICKLE):
        return "a Python pickle"
    if start.startswith(_MARKUP):
        return "a web page"
    return "a JSON file" if start.lstrip().startswith(b"{") else None


def next_step(path: Path) -> str:
    """What to do with a file that is given as a model, or stands where another was expected."""
    start = first_bytes(path)
    if _is_safetensors(start):
        return f"give the directory that it lies in, with config.json and tokenizer files: {path.parent}"
    if start.startswith(_LFS_POINTER):
        return f"fetch the file itself: git lfs pull --include {path.name}"
    if start.startswith(GGUF_MAGIC):
        return f"give that file itself as the model: {path}"
    if start.startswith((_ZIP, _PICKLE)) and not _is_safetensors(start):
        return "pickled weights are not read; convert them with transformers' save_pretrained"
    return "fetch the file again"


def refuse_pointer(path: Path) -> None:
    """Refuse a file that git left as a pointer, wherever the file itself is expected.

    Raises:
        IntegrityError: with the command that fetches it.
    """
    _refuse(path, (_LFS_POINTER,))


def refuse_failed_download(path: Path) -> None:
    """Refuse a pointer or a web page in the place of a checkpoint's file; text may well be a page.

    Raises:
        IntegrityError: with what it is and how the file is had.
    """
    _refuse(path, (_LFS_POINTER, *_MARKUP))


def _refuse(path: Path, starts: tuple[bytes, ...]) -> None:
    if path.is_file() and first_bytes(path).startswith(starts):
        raise IntegrityError(f"{path} is {looks_like(path)}", next_step(path))


def refuse_as_model(path: Path) -> UsageError:
    """The error for a file, no GGUF, that was given as MODEL."""
    found = looks_like(path)
    described = "is no GGUF file" if found is None else f"is {found}"
    return UsageError(f"{path} {described}; a model is a .gguf file or a Hugging Face directory", next_step(path))


def _is_safetensors(start: bytes) -> bool:
    """A length of eight bytes, then a JSON object."""
    return len(start) > 9 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 30
