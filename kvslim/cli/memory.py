"""A limit on memory that no command can work under, told before native libraries end the process in their own way."""

from __future__ import annotations

from kvslim.errors import KvslimError

LEAST_MIB = 256  # address space of a command that runs graphs, measured as 240 on two cores
LEAST_WITH_TORCH_MIB = 1536  # of one that opens the model, or counts its parameters; measured as 1,300 for `compress`
WITH_TORCH = {"compress", "plan", "analyze", "validate", "eval", "inspect"}


class MemoryLimitError(KvslimError):
    """The memory of the machine, or what the process may have of it, is used up (exit code 4)."""

    exit_code = 4


def check_memory(command: str) -> None:
    """Refuses to start a command with less address space than its libraries take.

    Raises:
        MemoryLimitError: The limit of the process (`ulimit -v`) is below that.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    least = LEAST_WITH_TORCH_MIB if command in WITH_TORCH else LEAST_MIB
    if limit != resource.RLIM_INFINITY and limit < least * 2**20:
        raise MemoryLimitError(
            f"a memory limit of {limit // 2**20} MiB is less than kvslim {command} takes with the smallest model",
            where="ulimit -v",
            fix=f"raise it to {least} MiB (ulimit -v {least * 1024}) or more, by the model's size, or lift it",
        )
