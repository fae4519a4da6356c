"""What an exception that nobody expected has to say to a user: lack of memory, a file, a package, or a bug."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator
from pathlib import Path

from kvslim.errors import KvslimError

# torch, onnxruntime, safetensors and the library loader have no exception type for this, only these messages.
OUT_OF_MEMORY = (
    "bad_alloc",
    "bad allocation",
    "allocate memory",
    "enough memory",
    "start new thread",
    "failed to map segment",
)

GPU_OUT_OF_MEMORY = "OutOfMemoryError"  # torch's, which is not imported for its name


class MemoryLimitError(KvslimError):
    """The memory of the machine or of its GPU, or the memory limit of the process, is used up (exit code 4)."""

    exit_code = 4


class FileAccessError(KvslimError):
    """The system refuses to read or write a file (exit code 2)."""

    exit_code = 2


def explained(caught: BaseException) -> KvslimError:
    """Any exception as a `KvslimError`. Lack of memory and file errors are recognised however deep they were raised."""
    if any(_is_out_of_memory(error) for error in _chain(caught)):
        return _after(
            MemoryLimitError(
                "out of memory",
                where=_place(caught),
                fix="free memory, raise the limit (ulimit -v), or use a smaller model, context or batch",
            ),
            caught,
        )
    if any(type(error).__name__ == GPU_OUT_OF_MEMORY for error in _chain(caught)):
        fix = "set CUDA_VISIBLE_DEVICES to nothing, to compute on the CPU"
        return _after(MemoryLimitError("the memory of the GPU is too small", where=_place(caught), fix=fix), caught)
    if isinstance(caught, KvslimError):
        return caught
    if isinstance(caught, ModuleNotFoundError):
        from kvslim.packages import missing_package

        return _after(missing_package(caught) or bug(caught), caught)
    if isinstance(caught, OSError) and caught.strerror:
        fix = "check that the file can be read or written, and that the disk has space"
        return _after(FileAccessError(caught.strerror, where=str(caught.filename or "the output"), fix=fix), caught)
    return bug(caught)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, and the exceptions that it was raised from or while handling."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(
        error, KvslimError | ValueError
    ):  # a validation error quotes its input, which could contain these words
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def _place(caught: BaseException) -> str:
    if isinstance(caught, KvslimError):
        return caught.where
    frames = traceback.extract_tb(caught.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "kvslim"


def _after(error: KvslimError, caught: BaseException) -> KvslimError:
    error.__cause__ = caught
    return error


def bug(caught: BaseException) -> KvslimError:
    """An unexpected exception as an error of one line."""
    reason = str(caught).strip().partition("\n")[0]
    fix = "set KVSLIM_DEBUG=1 to see the traceback, and report it"
    return _after(KvslimError(f"{type(caught).__name__}: {reason}", where=_place(caught), fix=fix), caught)
