"""Publishing a directory whole or not at all.

Work goes into a sibling `.NAME.partial`. When it is complete its files are fsynced, the directory is renamed to its
final name, and the parent is fsynced. A crash leaves the previous artefact as it was and the partial one to resume.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from factorctl.errors import FactorctlError, ResourceError, UsageError
from factorctl.files.names import MANIFEST_NAME

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
NAME_BYTES, PATH_BYTES = 255, 4095
"""What Linux and the usual file systems take."""
OF_OUTPUTS = "choose another --out, or fix its permissions"
OF_CACHES = "set FACTORCTL_CACHE to a directory that can be written, or fix its permissions"
"""What to do about a place that cannot be written."""


def partial_path(final: Path) -> Path:
    """Where the artefact `final` is being made: a sibling, so that the rename stays in one file system."""
    return final.with_name(f".{final.name}.partial")


def refuse_existing(final: Path, *, overwrite: bool) -> None:
    """Refuse to replace what stands at `final` unless it was asked for and is ours to replace.

    Raises:
        UsageError: something is there and `overwrite` is false, or it is not an artefact of this program:
            a mistyped --out must never cost anyone a source checkpoint or a home directory.
    """
    if final.name in ("", ".."):
        raise UsageError(f"{final} is no name for a new directory", "choose an --out that ends in a name")
    refuse_impossible_name(final)
    if final.is_symlink():
        raise UsageError(f"{final} is a symbolic link", "choose another --out, or give the directory it leads to")
    if blocking := next((p for p in final.parents if p.exists() and not p.is_dir()), None):
        raise UsageError(f"{blocking} is a file, not a directory", "choose another --out")
    if not final.exists():
        return
    if not final.is_dir():
        raise UsageError(f"{final} is a file, not a directory", "choose another --out")
    if not overwrite:
        raise UsageError(
            f"{final} exists", "choose another --out, or pass --overwrite to replace it once the new one is whole"
        )
    if not (final / MANIFEST_NAME).is_file() and any(final.iterdir()):
        raise UsageError(
            f"{final} holds no {MANIFEST_NAME}: --overwrite replaces only what factorctl made",
            "choose another --out, or remove that directory yourself",
        )


def refuse_impossible_name(final: Path) -> None:
    """Refuse what no file system takes, with room for the names of what lies beside the artefact and in it.

    Raises:
        UsageError: the name or the path is too long, or no UTF-8.
    """
    try:
        parts = [len(part.encode()) for part in final.absolute().parts]
    except UnicodeEncodeError:
        raise UsageError(f"the name {str(final)!a} is no UTF-8", "choose another --out") from None
    if max(parts) > NAME_BYTES or parts[-1] > NAME_BYTES - 16 or sum(parts) + len(parts) > PATH_BYTES - 64:
        raise UsageError(
            f"{str(final)[:80]}... is too long: a name has {NAME_BYTES - 16} bytes, a path {PATH_BYTES - 64}",
            "choose a shorter name",
        )


@contextmanager
def sole_writer(final: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of `final` while the block runs; the kernel releases it when the process dies.

    Args:
        wait: wait for another process that holds it, as caches do, rather than refuse.

    Raises:
        UsageError: another process writes the same output, or no file system takes its name.
    """
    refuse_impossible_name(final)
    lock = final.with_name(f".{final.name}.lock")
    remedy = OF_CACHES if wait else OF_OUTPUTS
    with writable(final.parent, remedy):
        final.parent.mkdir(parents=True, exist_ok=True)
        handle = _open_locked(lock, final, wait=wait)
    try:
        with writable(lock, remedy):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        with suppress(OSError):  # one that stays behind is free: the kernel holds the lock, not the file
            lock.unlink()  # while the lock is held, so that nobody else's is removed
        fcntl.flock(handle, fcntl.LOCK_UN)  # closing alone would leave it with a forked child
        os.close(handle)


@contextmanager
def sole_writer_of(*places: Path | None) -> Iterator[None]:
    """Hold the locks of several outputs, each once however it is spelt; None is no output."""
    wanted = {os.path.realpath(place): place for place in places if place is not None}.values()
    for place in wanted:
        refuse_impossible_name(place)
    with ExitStack() as held:
        for place in wanted:
            held.enter_context(sole_writer(place))
        yield


def _open_locked(lock: Path, final: Path, *, wait: bool) -> int:
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), lock.stat()):
                return handle
        except FileNotFoundError:
            pass  # the owner removed it after we opened it
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise UsageError(f"{final} is being written by {holder}", "wait for it, or choose another --out") from None
        os.close(handle)  # we hold a file that its owner has removed: take a new one


def make_directory(path: Path) -> None:
    """Make a directory with its parents, unless it is there.

    Raises:
        ResourceError: the system refuses.
    """
    with writable(path):
        path.mkdir(parents=True, exist_ok=True)


def temporary_path(path: Path) -> Path:
    """Where the new content of `path` is written before it replaces the old."""
    return path.with_name(f".{path.name}.tmp")


def write_file(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either its old content or all of the new, also after a power cut."""
    temporary = temporary_path(path)
    with writable(path):
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def publish_directory(partial: Path, final: Path) -> None:
    """Give the complete directory `partial` its final name; what stood there before is removed afterwards."""
    with writable(final.parent):
        fsync_directory(partial)
        if final.exists():
            _swap(partial, final)
            fsync_directory(final.parent)
            shutil.rmtree(partial)
        else:
            partial.rename(final)
        fsync_directory(final.parent)


@contextmanager
def cache_entry(home: Path) -> Iterator[Path]:
    """A fresh directory that takes the name `home` when the block ends well, and is removed if it fails.

    Under `sole_writer(home, wait=True)`, so that what a killed process left there belongs to nobody.
    """
    with discarded_on_failure(partial_path(home)) as partial:
        yield partial
        publish_directory(partial, home)


@contextmanager
def discarded_on_failure(partial: Path) -> Iterator[Path]:
    """A fresh `partial` that is removed again if the block fails, for work that cannot be resumed."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def fsync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(first: Path, second: Path) -> None:
    """Exchange two directories in one atomic step, so that a kill in between cannot leave the name empty."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        status = libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
        if status == 0:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(second))
    aside = second.with_name(f".{second.name}.replaced")
    second.rename(aside)
    first.rename(second)
    aside.rename(first)


@contextmanager
def writable(path: Path, remedy: str = OF_OUTPUTS) -> Iterator[None]:
    """Turn the system's refusals to write into errors that say what to do."""
    try:
        yield
    except OSError as error:
        raise _explained(error, path, remedy) from error


def _explained(error: OSError, path: Path, remedy: str) -> FactorctlError:
    is_short_write = error.errno is None and "requested and" in str(error)  # numpy's tofile drops the system's reason
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or is_short_write:
        return ResourceError(
            f"no space left while writing {path}",
            "free some disk space and run the same command again: finished parts are kept",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ResourceError(f"{path} cannot be written: {error.strerror}", remedy)
    return ResourceError(f"writing {path} failed: {error.strerror or error}")


def require_disk_space(directory: Path, needed: int) -> None:
    """Refuse before the first byte is written when the disk cannot hold the result.

    Raises:
        ResourceError: with both numbers.
    """
    existing = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ResourceError(
            f"{directory} needs {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are free",
            "free space, or choose another --out",
        )
