"""Where text is passed through a model: on a GPU where torch sees one, else on the CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from kvslim.memory import usable_memory


def computing_device() -> torch.device:
    """The GPU of CUDA or ROCm that is torch's own choice, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take there."""
    return usable_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]


def where(model: Any) -> AbstractContextManager[Any]:
    """Within the block torch makes numbers where a model is."""
    device: torch.device = model.device
    return nullcontext() if device.type == "cpu" else device
