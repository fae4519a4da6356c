"""Where weights are trained: on a GPU where torch sees one, else on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kvslim.errors import UsageError
from kvslim.memory import usable_memory


def training_device() -> torch.device:
    """The GPU of CUDA or ROCm that is torch's own choice, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take there."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else usable_memory()


@contextmanager
def within_memory() -> Iterator[None]:
    """Tells how to go on where the memory of a GPU ends.

    Raises:
        UsageError: It does.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UsageError(
            "the memory of the GPU is too small to train in",
            where="recipe: heal",
            fix="set CUDA_VISIBLE_DEVICES to nothing, to train on the CPU",
        ) from error
