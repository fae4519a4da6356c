"""Weights larger than memory: their numbers lie in files, and memory holds those that are in use.

A tensor that is mapped from a file is read page by page when it is used, and what is written to it goes back to the
file. So the system can drop its pages at any time, and all code that computes with weights stays as it is. The files
lose their names at once, so nothing of them is left when the process ends, in whatever way.
"""

from __future__ import annotations

import ctypes
import mmap
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvslim.errors import OutputError
from kvslim.memory import give_back, is_too_large

if TYPE_CHECKING:
    import torch

    from kvslim.loading.snapshot import Unread

Array = npt.NDArray[Any]
FLOAT = 4  # bytes
PART = 2**24  # numbers that are converted at a time
SMALL, LARGE = 2**12, 2**20  # bytes that are not worth a file, and bytes that always are
IN_MEMORY = {"tmpfs", "ramfs"}
FIX = "set TMPDIR to a folder on a disk with more space"
_ALIVE: weakref.WeakSet[MappedWeights] = weakref.WeakSet()
_IN_FILES: weakref.WeakValueDictionary[int, Array] = weakref.WeakValueDictionary()  # by address


class MappedWeights:
    """Tensors in float32 that are mapped from files without names."""

    def __init__(self) -> None:
        self._arrays: list[Array] = []
        _ALIVE.add(self)

    def read(self, stored: Mapping[str, Unread]) -> dict[str, Any]:
        """Stored tensors by name, read into files one after the other; whole numbers stay in memory.

        Raises:
            OutputError: The disk is full.
        """
        found: dict[str, Any] = {}
        for name, unread in stored.items():
            tensor = unread[...]
            found[name] = self.put(tensor) if tensor.is_floating_point() else tensor
            del tensor
            give_back()
        return found

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the same numbers in float32, mapped from a file.

        Raises:
            OutputError: The disk is full.
        """
        import torch

        parts = (part.to(torch.float32).numpy() for part in tensor.reshape(-1).split(PART))
        mapped = _mapped(parts, FLOAT * tensor.numel())
        self._arrays.append(mapped.numpy())
        return mapped.view(torch.float32).view(tensor.shape)

    def follow(self, model: Any) -> None:
        """Lets go of all weights behind each layer of a model, whenever it runs, and behind its head."""
        from torch.nn import ModuleList

        layers = [layer for module in model.modules() if isinstance(module, ModuleList) for layer in module]
        for module in (*layers, model):
            module.register_forward_hook(lambda *_: self.let_go())

    def let_go(self) -> None:
        """Drops all their pages from this process; the files keep what was written to them."""
        _drop(self._arrays)


def in_file(array: Array) -> Array:
    """The same numbers, mapped from a file where they are many or where weights lie in files.

    What is only needed again when a graph is written does not take memory until then.

    Raises:
        OutputError: The disk is full, and the weights are larger than memory.
    """
    if array.nbytes < (SMALL if _ALIVE else LARGE):
        return array
    whole = np.ascontiguousarray(array)
    try:
        mapped = _mapped([whole], whole.nbytes).numpy()
    except OutputError:
        if _ALIVE:
            raise
        return array
    _IN_FILES[mapped.ctypes.data] = mapped  # it lives as long as any view of it
    found: Array = mapped.view(array.dtype).reshape(array.shape)
    return found


def _mapped(parts: Iterable[Array], size: int) -> torch.Tensor:
    """The bytes of arrays one after another, `size` in all, mapped from a file that has no name any more."""
    import torch

    try:
        with tempfile.NamedTemporaryFile(prefix="kvslim-") as file:
            for part in parts:
                file.write(part.data)
            file.flush()
            return torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8)
    except OSError as error:
        message = f"the weights are larger than memory, and a file cannot take them: {error.strerror}"
        raise OutputError(message, where=tempfile.gettempdir(), fix=FIX) from error


def _drop(mapped: Iterable[Array]) -> None:
    """Drops all pages of mapped arrays from this process; the files keep what was written to them."""
    advise = ctypes.CDLL(None).madvise
    for array in mapped:
        advise(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), mmap.MADV_DONTNEED)


def let_go() -> None:
    """Drops the pages of all that is mapped from this process, and what is free: for loops over matrices."""
    _drop(list(_IN_FILES.values()))
    alive = list(_ALIVE)
    for weights in alive:
        weights.let_go()
    if alive:
        give_back()


def mapped_bytes(model: Any) -> int:
    """Bytes of a model's weights in float32 where memory is too small for them; else 0.

    Args:
        model: The model on torch's meta device.
    """
    size = FLOAT * sum(weight.numel() for weight in model.parameters())
    return size if is_too_large(size) else 0


def check_folder() -> None:
    """Refuses a folder for temporary files that lies in memory itself.

    Raises:
        OutputError: Naming the folder.
    """
    import psutil

    folder = Path(tempfile.gettempdir()).resolve()
    kinds = {Path(disk.mountpoint): disk.fstype for disk in psutil.disk_partitions(all=True)}
    kind = next((kinds[place] for place in (folder, *folder.parents) if place in kinds), "")
    if kind in IN_MEMORY:
        message = f"the weights are larger than memory, and the folder for temporary files lies in memory too ({kind})"
        raise OutputError(message, where=str(folder), fix=FIX)
