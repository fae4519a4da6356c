"""Refuses a memory limit that is too low for a command. Native libraries would abort without a clear message."""

from __future__ import annotations

from kvslim.unexpected import MemoryLimitError

LEAST_MIB = 384  # address space of a command that runs graphs; measured: 240 on two cores, 40 more for each further one
LEAST_WITH_TORCH_MIB = 1536  # of one that opens the model or counts its parameters; measured: 1,300 for `compress`
WITH_TORCH = {"compress", "plan", "analyze", "validate", "eval", "inspect"}


def check_memory(command: str) -> None:
    """Refuses to start a command with less address space than its libraries need.

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
            f"a memory limit of {limit // 2**20} MiB is less than kvslim {command} needs even for the smallest model",
            where="ulimit -v",
            fix=f"raise it to {least} MiB (ulimit -v {least * 1024}) or more for larger models, or remove it",
        )
