"""How a session holds the cache of one layer: memory, binding, rewinding. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from kvslim.contract import WINDOW_SLACK, KVTensor

Array = npt.NDArray[Any]
FILL_PERIOD = 256
TAKEN_BACK = 16  # tokens of a run that rings can drop again: as many as a draft proposes, and the one before them
NUMPY_TYPES: Mapping[str, Any] = {"float32": np.float32, "int8": np.int8}  # all else is packed in bytes


class LayerBuffers:
    """A full cache: past and present of each tensor lie in one buffer, so that the operator appends in place.

    Attributes:
        tensors: The layer's KV inputs.
        arrays: Their memory, in the same order.
        prefill_chunk: Prompt tokens of one run, so that what a run holds in memory stays small.
        pauses_after: Tokens of a text after which a run must end, or 0.
        single_sequence: Why only one sequence can be decoded and what to do about it, or None.

    Args:
        tensors: The layer's KV inputs.
        capacity: Tokens to allocate for.
        batch: Sequences.
        note: What the graph's metadata say of the layer, or None.
        aliases: For each tensor, outputs of other layers that are to lie in its memory too.
    """

    prefill_chunk: ClassVar[int] = 512
    pauses_after: int = 0
    single_sequence: tuple[str, str] | None = None

    def __init__(
        self,
        tensors: Sequence[KVTensor],
        *,
        capacity: int,
        batch: int,
        note: Any = None,
        aliases: Sequence[Sequence[str]] = (),
    ) -> None:
        self.tensors, self.capacity, self.batch = tuple(tensors), capacity, batch
        self.aliases = tuple(map(tuple, aliases)) or ((),) * len(self.tensors)
        self.arrays = [self.allocated(tensor) for tensor in self.tensors]

    def allocated(self, tensor: KVTensor) -> Array:
        """Memory for an empty cache."""
        return np.zeros(
            (self.batch, tensor.heads, tensor.rows(self.capacity), tensor.columns),
            dtype=NUMPY_TYPES.get(tensor.dtype, np.uint8),
        )

    def bind(self, binding: ort.IOBinding, rows: slice) -> None:
        """Binds what stays bound from run to run, of the sequences in some rows of the batch."""
        for tensor, array, aliases in zip(self.tensors, self.arrays, self.aliases, strict=True):
            value = ort.OrtValue.ortvalue_from_numpy(array[rows])
            binding.bind_ortvalue_input(tensor.past, value)
            for present in (tensor.present, *aliases):
                binding.bind_ortvalue_output(present, value)

    def bind_step(self, binding: ort.IOBinding, length: int, total: int) -> None:
        """Binds what a run from `length` to `total` tokens needs besides."""

    def after_step(self, length: int, total: int) -> bool:
        """Takes note of a run; whether the buffers are others now, and must be bound again."""
        return False

    def reserve(self, length: int) -> bool:
        """Makes room for a context of `length` tokens; whether the buffers are others now."""
        return False

    def reset(self) -> bool:
        """Forgets the text; whether the buffers are others now."""
        return False

    def refusal(self, length: int, current: int) -> str | None:
        """Why a cache of `current` tokens can't be cut to `length`, or None if it can."""
        if any(self.has_dropped(tensor, length, current) for tensor in self.tensors):
            return f"a window has dropped tokens that a context of {length} needs"
        return None

    def takes_back(self, length: int, total: int) -> bool:
        """Whether a run from `length` to `total` tokens can be cut to its first one."""
        return self.refusal(length + 1, total) is None

    def rewind(self, length: int) -> None:
        """Drops the tail, so that `length` tokens remain; not refused."""

    def has_dropped(self, tensor: KVTensor, length: int, current: int) -> bool:
        """Whether a tensor that holds `current` tokens lacks one that it needs when only `length` remain."""
        if tensor.window is None:
            return False
        return _kept(length, tensor.window) != _kept(current, tensor.window) - (current - length)

    def fill(self, length: int, generator: np.random.Generator) -> bool:
        """Sets the cache to `length` tokens of pseudo-random content; whether the buffers are others now."""
        for tensor, array in zip(self.tensors, self.arrays, strict=True):
            for sequence in array:
                _fill(self.heads_first(tensor, sequence), min(tensor.rows(length), length), generator)
        return False

    @property
    def lends_rows(self) -> bool:
        """Whether a cache with some of the rows is one that the layer can read.

        Not where the operator keeps the model's own window, and counts what it has dropped.
        """
        return all(tensor.window is None for tensor in self.tensors)

    def borrow(self, other: LayerBuffers, rows: slice, start: int) -> None:
        """Copies rows of another cache of the layer, to stand from row `start` on."""
        count = rows.stop - rows.start
        for array, source in zip(self.arrays, other.arrays, strict=True):
            array[:, :, start : start + count] = source[:, :, rows]

    def move(self, source: int, target: int, length: int) -> None:
        """Copies a sequence of `length` tokens over another one."""
        for tensor, array in zip(self.tensors, self.arrays, strict=True):
            rows = min(tensor.rows(length), length)
            array[target, :, :rows] = array[source, :, :rows]

    def heads_first(self, tensor: KVTensor, sequence: Array) -> Array:
        """One sequence of a tensor as [heads, rows, columns]."""
        return sequence


class Overwritten(NamedTuple):
    """What a run took the rows of.

    Attributes:
        start: Tokens before the run.
        stop: Tokens after it.
        rows: By tensor, what lay in the row of each of its tokens, [batch, heads, stop - start, columns].
    """

    start: int
    stop: int
    rows: list[Array]


class RingBuffers(LayerBuffers):
    """Rings: what a window has dropped is gone, but for that which a short run has dropped last.

    So proposals of a draft can be taken back. A run of one token has none.

    Attributes:
        takes_runs_back: Whether that is so.
    """

    takes_runs_back: ClassVar[bool] = True
    _last: Overwritten | None = None

    def bind_step(self, binding: ort.IOBinding, length: int, total: int) -> None:
        """Keeps what a short run of several tokens will overwrite."""
        self._last = None
        if total - length > 1 and self._is_short(length, total):
            kept = zip(self.tensors, self.arrays, strict=True)
            rows = [array[:, :, _places(tensor, length, total)] for tensor, array in kept]
            self._last = Overwritten(length, total, rows)

    def takes_back(self, length: int, total: int) -> bool:
        """Where the ring is not full yet, or what the run overwrites is kept."""
        return self._is_short(length, total) or super().takes_back(length, total)

    def rewind(self, length: int) -> None:
        """Puts back what stood in the rows of the tokens that go."""
        if self._last is not None:
            start, stop, kept = self._last
            first = max(length, start)  # less remains only where nothing was overwritten
            for tensor, array, rows in zip(self.tensors, self.arrays, kept, strict=True):
                array[:, :, _places(tensor, first, stop)] = rows[:, :, first - start :]
            self._last = None

    def reset(self) -> bool:
        """Forgets the text."""
        self._last = None
        return False

    def fill(self, length: int, generator: np.random.Generator) -> bool:
        """Sets the cache to `length` tokens of pseudo-random content; whether the buffers are others now."""
        self._last = None
        return super().fill(length, generator)

    def has_dropped(self, tensor: KVTensor, length: int, current: int) -> bool:
        """Once the ring is full, every new token takes the row of an old one."""
        if current <= length or current <= _rows(tensor):
            return False
        return self._last is None or self._last.stop != current or self._last.start > length

    def _is_short(self, length: int, total: int) -> bool:
        """Whether a run is short enough to be kept, with a row for each of its tokens."""
        windows = (_rows(tensor) - _sinks(tensor) for tensor in self.tensors)
        return self.takes_runs_back and total - length <= min(TAKEN_BACK, *windows)


class StateBuffers(RingBuffers):
    """Rings, and a state of what left them: a sum, from which no token can be taken back."""

    prefill_chunk: ClassVar[int] = 64  # scores of a whole chunk are held in memory
    takes_runs_back: ClassVar[bool] = False

    def reset(self) -> bool:
        """Empties the state; a ring says by the length of the text which rows count."""
        self.arrays[-1][:] = 0
        return False

    def refusal(self, length: int, current: int) -> str | None:
        """A token that left the window is in the state for good."""
        if any(self.has_dropped(tensor, length, current) for tensor in self.tensors):
            return f"a state has taken in tokens that a context of {length} holds apart"
        return None

    def fill(self, length: int, generator: np.random.Generator) -> bool:
        """Sets the cache to pseudo-random content; weights in the state are positive."""
        super().fill(length, generator)
        np.abs(self.arrays[-1], out=self.arrays[-1])
        return False

    @property
    def lends_rows(self) -> bool:
        """A state has no rows of tokens."""
        return False

    def move(self, source: int, target: int, length: int) -> None:
        """Copies a sequence over another one, all of its state."""
        super().move(source, target, length)
        self.arrays[-1][target] = self.arrays[-1][source]


class PackedBuffers(RingBuffers):
    """Rings, and codes: the rows so far as past, and the rows behind them for those that a run adds."""

    prefill_chunk: ClassVar[int] = 64  # scores of a whole chunk are held in memory
    takes_runs_back: ClassVar[bool] = False  # and reads as it was what single tokens read as codes: other text
    single_sequence = ("packed codes are appended to one sequence", "use a batch of 1")

    def allocated(self, tensor: KVTensor) -> Array:
        """Memory for an empty cache; codes have rows before heads, so that a row can be appended."""
        if not _is_codes(tensor):
            return super().allocated(tensor)
        return np.zeros((self.batch, tensor.rows(self.capacity), tensor.heads, tensor.columns), dtype=np.uint8)

    def bind(self, binding: ort.IOBinding, rows: slice) -> None:
        """Binds the rings."""
        for tensor, array in zip(self.tensors, self.arrays, strict=True):
            if not _is_codes(tensor):
                value = ort.OrtValue.ortvalue_from_numpy(array[rows])
                binding.bind_ortvalue_input(tensor.past, value)
                binding.bind_ortvalue_output(tensor.present, value)

    def bind_step(self, binding: ort.IOBinding, length: int, total: int) -> None:
        """Binds the codes so far, and the rows for those that the run adds."""
        for tensor, array in zip(self.tensors, self.arrays, strict=True):
            if _is_codes(tensor):
                start, stop = tensor.rows(length), tensor.rows(total)
                past, added = array[:, :start], array[:, start:stop]
                binding.bind_ortvalue_input(tensor.past, ort.OrtValue.ortvalue_from_numpy(past))
                binding.bind_ortvalue_output(tensor.present, ort.OrtValue.ortvalue_from_numpy(added))

    def heads_first(self, tensor: KVTensor, sequence: Array) -> Array:
        """One sequence of a tensor as [heads, rows, columns]."""
        return sequence.swapaxes(0, 1) if _is_codes(tensor) else sequence


def bind_all(binding: ort.IOBinding, layers: Iterable[LayerBuffers], rows: slice) -> None:
    """Binds the buffers of all layers as they are now, of the sequences in some rows of the batch."""
    binding.clear_binding_inputs()
    binding.clear_binding_outputs()
    for layer in layers:
        layer.bind(binding, rows)


def _is_codes(tensor: KVTensor) -> bool:
    return tensor.kind.endswith("_codes")


def _sinks(tensor: KVTensor) -> int:
    return tensor.sinks or 0


def _rows(tensor: KVTensor) -> int:
    """Tokens that a ring holds."""
    return (tensor.window or 0) + _sinks(tensor)


def _places(tensor: KVTensor, length: int, total: int) -> Array:
    """The rows of a ring that tokens from `length` to `total` take."""
    tokens, sinks = np.arange(length, total), _sinks(tensor)
    return np.where(tokens < sinks, tokens, sinks + (tokens - sinks) % (_rows(tensor) - sinks))


def _kept(tokens: int, window: int) -> int:
    """Rows that the kernel keeps of so many tokens: it drops them in blocks when the cache is full."""
    block = WINDOW_SLACK + 1
    over = max(0, tokens - window - WINDOW_SLACK)
    return tokens - block * -(-over // block)


def _fill(buffer: Array, rows: int, generator: np.random.Generator) -> None:
    """Sets the first rows of a buffer [heads, rows, columns]; drawing all of them would take too long."""
    heads, _, columns = buffer.shape
    content = _noise(generator, (heads, min(rows, FILL_PERIOD), columns), buffer.dtype)
    for start in range(0, rows, FILL_PERIOD):
        buffer[:, start : min(start + FILL_PERIOD, rows)] = content[:, : rows - start]


def _noise(generator: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Content that a cache of a type could have."""
    if dtype == np.uint8:
        return generator.integers(256, size=shape, dtype=np.uint8)
    noise = generator.standard_normal(shape, dtype=np.float32)
    return np.clip(noise * 40, -127, 127).astype(np.int8) if dtype == np.int8 else noise
