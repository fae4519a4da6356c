"""An output folder appears whole or not at all, and never in place of somebody else's files.

The folder is built as `OUT.partial-*` beside OUT, under a file lock that the system drops when the process dies,
whatever killed it. The next run for the same OUT removes what such a process left.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kvslim.errors import KvslimError, OutputError
from kvslim.export.manifest import MANIFEST, read_manifest

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
LOCK_TRIES = 8


def check_output(out: Path, overwrite: bool = False) -> None:
    """Fails early when `out` could not be written at the end.

    Args:
        out: The folder to be.
        overwrite: Whether an artifact that is already there may be replaced.

    Raises:
        OutputError: `out` is taken, or its parent cannot be written.
    """
    out = _real(out)
    with _output_errors(out):
        recover(out)
        _check_taken(out, overwrite)
        parent = _existing_parent(out)
        os.rmdir(tempfile.mkdtemp(prefix=".kvslim-probe-", dir=parent))  # noqa: PTH106 (a string from mkdtemp)


@contextlib.contextmanager
def staging(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder beside `out` that takes its name when the block ends, and vanishes when it fails.

    Args:
        out: The folder to be; missing parents are made.
        overwrite: Whether an artifact that is already there may be replaced.

    Yields:
        The folder to write into.

    Raises:
        OutputError: `out` is taken or cannot be written, now or on the way (disk full, no permission).
    """
    out = _real(out)
    check_output(out, overwrite)
    with _output_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial, lock = _locked_folder(out)
    try:
        with _output_errors(out, partial):
            yield partial
            _flush_to_disk(partial)
            _check_taken(out, overwrite)
            _publish(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def _output_errors(out: Path, folder: Path | None = None) -> Iterator[None]:
    """Turns the system's refusals to write into an `OutputError`.

    Args:
        out: The folder to be, named where the system names no file.
        folder: Where given, only errors about this folder, what it holds or a full disk are meant.
    """
    try:
        yield
    except OSError as error:
        if folder is not None and error.errno not in NO_SPACE and not _concerns(error.filename, (folder, out)):
            raise
        raise OutputError(
            f"cannot write: {error.strerror or error}",
            where=str(error.filename or out),
            fix="free some space, or give another --out" if error.errno in NO_SPACE else "give another --out",
        ) from error


def _concerns(filename: object, folders: tuple[Path, ...]) -> bool:
    if not isinstance(filename, str | bytes | os.PathLike):
        return False
    return any(Path(os.fsdecode(filename)).is_relative_to(folder) for folder in folders)


def _real(out: Path) -> Path:
    """The folder behind a symbolic link, so that the link stays a link."""
    return Path(os.path.realpath(out.expanduser()))


def _existing_parent(out: Path) -> Path:
    parent = next(folder for folder in out.parents if folder.exists())
    if not parent.is_dir():
        raise OutputError("a file stands where a folder is needed", where=str(parent), fix="give another --out")
    return parent


def _check_taken(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    foreign = _foreign(out)
    if foreign:
        raise OutputError(
            f"{foreign}, so it is not overwritten", where=str(out), fix="give another --out, or remove it yourself"
        )
    if not overwrite:
        raise OutputError("this artifact exists already", where=str(out), fix="add --force to replace it")


def _foreign(out: Path) -> str | None:
    """What shows that `out` holds something that KVSlim did not write, if anything does."""
    if not out.is_dir():
        return "this is a file"
    try:
        known = {*read_manifest(out).files, MANIFEST}
    except KvslimError:
        return "this folder is not an artifact of KVSlim"
    files = (path.relative_to(out).as_posix() for path in sorted(out.rglob("*")) if not path.is_dir())
    strange = next((name for name in files if name not in known), None)
    return f"this artifact also holds {strange}" if strange else None


def _locked_folder(out: Path) -> tuple[Path, int]:
    """A new folder beside `out`, with the descriptor that holds its lock."""
    for _ in range(LOCK_TRIES):
        partial = Path(tempfile.mkdtemp(prefix=f"{out.name}.partial-", dir=out.parent))
        lock = _lock(partial)
        if lock is not None:
            partial.chmod(0o755)
            return partial, lock
        shutil.rmtree(partial, ignore_errors=True)
    raise OutputError("this file system locks no folders", where=str(out.parent), fix="give an --out on a local disk")


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock, or None where it cannot be had."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between open and flock the folder may have been removed: a lock on it would guard nothing.
        if os.path.samestat(os.fstat(descriptor), folder.stat()):
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def recover(out: Path) -> None:
    """Removes what killed processes left of a folder, and puts back an artifact that one of them had moved aside."""
    for left in sorted(_left_behind(out)):
        lock = _lock(left)
        if lock is None:
            continue
        try:
            if left.name.startswith(f"{out.name}.old-") and not out.exists():
                left.rename(out)
            else:
                shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(lock)


def _left_behind(out: Path) -> Iterator[Path]:
    if not out.parent.is_dir():
        return
    prefixes = (f"{out.name}.partial-", f"{out.name}.old-")
    yield from (path for path in out.parent.iterdir() if path.name.startswith(prefixes) and path.is_dir())


def _flush_to_disk(folder: Path) -> None:
    """Writes through, so that a full disk shows before the rename and a power cut cannot empty the files after it."""
    for path in sorted(folder.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _publish(partial: Path, out: Path) -> None:
    """Renames `partial` to `out`, by way of `OUT.old-*` where an artifact is there; `recover` heals a kill between."""
    if not out.exists():
        partial.rename(out)
        return
    lock = _lock(out)
    if lock is None:
        raise OutputError("another process is replacing this artifact", where=str(out), fix="run again when it is done")
    old = out.with_name(f"{out.name}.old-{partial.name.rpartition('-')[2]}")
    try:
        out.rename(old)
        try:
            partial.rename(out)
        except BaseException:
            old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        os.close(lock)
