"""Buffers of a layer whose heads share attention, and the clusters that are formed from a prompt's first tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from kvslim.caches.buffers import LayerBuffers
from kvslim.caches.clustered import ATTENTIONS, CLUSTER_INPUTS, ClusteredTensor, ClustersNote
from kvslim.caches.clustering import FIRST_TOKENS, Formed
from kvslim.contract import KVTensor

Array = npt.NDArray[Any]
ROOM = 256  # rows by which the cache grows: all of them are multiplied at every step


class ClusteredBuffers(LayerBuffers):
    """Buffers that grow with the text; with dynamic clusters all heads attend until the first tokens were seen.

    Attributes:
        formed: How the layer forms clusters for each prompt; None where they are fixed.
        heads: For each query head the one whose attention it takes; None where that is fixed.
        is_formed: Whether nothing is left to form.
    """

    prefill_chunk: ClassVar[int] = 64  # scores of a whole chunk are held in memory

    def __init__(self, tensors: Sequence[KVTensor], *, note: ClustersNote | None = None, **sizes: Any) -> None:
        self.formed = None if note is None else Formed(note.count, np.array(note.calibrated))
        self._forget()
        super().__init__(tensors, **sizes)

    @property
    def pauses_after(self) -> int:  # type: ignore[override]
        """Clusters are formed after the first tokens, so a run must end there."""
        return 0 if self.is_formed else FIRST_TOKENS

    @property
    def single_sequence(self) -> tuple[str, str] | None:  # type: ignore[override]
        """Clusters are one prompt's."""
        if self.formed is None:
            return None
        return "clusters of heads are formed for one prompt at a time", "use a batch of 1, or static clusters"

    def allocated(self, tensor: KVTensor) -> Array:
        """Memory for an empty cache, with keys of all heads while clusters are not formed."""
        heads = tensor.heads if self.formed is None else len(self.formed.calibrated)
        rows = min(ROOM, self.capacity)
        return np.zeros((self.batch, heads, rows, tensor.columns), dtype=np.float32)

    def bind(self, binding: ort.IOBinding, rows: slice) -> None:
        """Binds the cache, and the heads that attend."""
        super().bind(binding, rows)
        if self.heads is not None:
            representatives, membership = np.unique(np.array(self.heads, np.int64), return_inverse=True)
            for name, part in zip(CLUSTER_INPUTS, (representatives, membership.astype(np.int64)), strict=True):
                binding.bind_ortvalue_input(name.format(self._layer), ort.OrtValue.ortvalue_from_numpy(part))

    def bind_step(self, binding: ort.IOBinding, length: int, total: int) -> None:
        """Binds where the weights of the new tokens go, as long as clusters are to be formed of them."""
        if not self.is_formed:
            heads, rows = self._seen.shape[0], self.arrays[0].shape[2]
            self._weights = np.empty((1, heads, total - length, rows), np.float32)
            value = ort.OrtValue.ortvalue_from_numpy(self._weights)
            binding.bind_ortvalue_output(ATTENTIONS.format(self._layer), value)

    def after_step(self, length: int, total: int) -> bool:
        """Keeps the weights of the first tokens, and forms clusters once it has seen all of them."""
        if self.is_formed:
            return False
        seen = self._weights[0][:, :, :FIRST_TOKENS]
        self._seen[:, length : length + seen.shape[1], : seen.shape[2]] = seen
        if total < FIRST_TOKENS:
            return False
        self._form()
        return True

    def reserve(self, length: int) -> bool:
        """Lets the buffers grow to a context of that length."""
        if self.arrays[0].shape[2] >= length:
            return False
        rows = min(-(-length // ROOM) * ROOM, self.capacity)
        for index, array in enumerate(self.arrays):
            self.arrays[index] = np.zeros((*array.shape[:2], rows, array.shape[3]), array.dtype)
            self.arrays[index][:, :, : array.shape[2]] = array
        return True

    @property
    def lends_rows(self) -> bool:
        """The buffers grow, and with dynamic clusters each has heads of its own."""
        return False

    def reset(self) -> bool:
        """Lets all heads attend again."""
        if self.formed is None or not self.is_formed:
            return False
        self._forget()
        self.arrays = [self.allocated(tensor) for tensor in self.tensors]
        return True

    def refusal(self, length: int, current: int) -> str | None:
        """Clusters stay as they were formed, so the tokens that they were formed from must stay."""
        if self.formed is not None and length < FIRST_TOKENS <= current:
            return f"clusters of heads were formed after a context of {length}"
        return super().refusal(length, current)

    def fill(self, length: int, generator: np.random.Generator) -> bool:
        """Forms clusters, and sets the cache to pseudo-random content."""
        if not self.is_formed:
            self._form()
        self.reserve(length)
        super().fill(length, generator)
        return True

    @property
    def _layer(self) -> int:
        return self.tensors[0].layer

    def _forget(self) -> None:
        self.is_formed, self.heads = self.formed is None, None
        if self.formed is not None:
            heads = len(self.formed.calibrated)
            self.heads = tuple(range(heads))
            self._seen = np.zeros((heads, FIRST_TOKENS, FIRST_TOKENS))

    def _form(self) -> None:
        """Clusters the heads by what was seen, and keeps the keys of those that attend."""
        assert self.formed is not None
        values = next(
            array[0] for tensor, array in zip(self.tensors, self.arrays, strict=True) if tensor.kind == "value"
        )
        first = np.zeros((len(self._seen), FIRST_TOKENS, values.shape[2]))
        rows = values[:, :FIRST_TOKENS]
        first[:, : rows.shape[1]] = rows
        self.heads = self.formed.clusters(self._seen, first)
        kept = sorted(set(self.heads))
        self.arrays = [
            np.ascontiguousarray(array[:, kept])
            if isinstance(tensor, ClusteredTensor) and tensor.has_dynamic_heads
            else array
            for tensor, array in zip(self.tensors, self.arrays, strict=True)
        ]
        self.is_formed = True
