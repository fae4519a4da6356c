"""A decode loop on stock onnxruntime whose KV cache is appended in place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from kvslim.errors import ArtifactError, UsageError
from kvslim.runtime.clusters import PromptClusters
from kvslim.runtime.graph import (
    ORT_ERRORS,
    Logits,
    artifact_error,
    formed_clusters,
    layout_of,
    open_session,
    shared_outputs,
)
from kvslim.types import ATTENTIONS, FIRST_TOKENS, WINDOW_SLACK, KVTensor

Tokens = Sequence[int] | npt.NDArray[np.int64]

_CHUNK, _SHORT_CHUNK = 512, 64
_ROOM = 256  # rows by which the cache of a layer with clusters grows: all of them are multiplied at every step
_FILL_PERIOD = 256
_STORED = {"float32": np.float32, "int8": np.int8}  # all else is packed in bytes


class DecodeSession:
    """Sequences of one length decoded through a preallocated KV cache; one unless `batch` says more.

    Past and present are bound to the same memory, so that the attention kernel appends the new tokens instead of
    copying the cache at every step.

    Attributes:
        layout: The KV tensors of the graph.
        capacity: Tokens that the cache has room for.
        batch: Sequences.
        length: Tokens that the cache holds of each now.
        vocab: Entries of one row of logits.

    Args:
        model: The `.onnx` file, or the folder that holds `model.onnx`.
        capacity: Tokens to allocate the cache for.
        threads: Threads of one operator; None leaves the choice to onnxruntime.
        all_positions: Whether to give logits of all new positions, as evaluation needs; else of the last one, if the
            graph is one of KVSlim's.
        batch: Sequences that are decoded side by side.

    Raises:
        UsageError: The capacity is not positive, or there are several sequences and packed codes or
                dynamic clusters.
        NotFoundError: There is no such file.
        ArtifactError: onnxruntime cannot load it, or it does not follow the graph contract.
    """

    def __init__(
        self,
        model: Path,
        *,
        capacity: int,
        threads: int | None = None,
        all_positions: bool = False,
        batch: int = 1,
    ) -> None:
        if capacity < 1:
            raise UsageError(f"a cache of {capacity} tokens holds nothing", where="capacity", fix="ask for 1 or more")
        self._where = str(model)
        self._session = open_session(model, threads, all_positions=all_positions)
        self.layout = layout_of(self._session)
        if batch > 1 and self.layout.is_packed:
            raise UsageError("packed codes are appended to one sequence", where=self._where, fix="use a batch of 1")
        if batch > 1 and self.layout.dynamic_layers:
            message = "clusters of heads are formed for one prompt at a time"
            raise UsageError(message, where=self._where, fix="use a batch of 1, or static clusters")
        self.capacity, self.batch = capacity, batch
        self.length = 0
        self.vocab = self._vocab()
        self._last_only = next(node.shape[1] for node in self._session.get_outputs() if node.name == "logits") == 1
        self._inputs = {node.name for node in self._session.get_inputs()}
        self._clusters = PromptClusters(formed_clusters(self._session))
        self._cache = [self._buffer(tensor) for tensor in self.layout.tensors]
        self._binding = self._session.io_binding()
        self._bind_cache()

    def reset(self) -> None:
        """Empties the cache."""
        self.length = 0
        if self._clusters.heads and self._clusters.is_formed:
            self._clusters.reset()
            self._cache = [
                self._buffer(tensor) if tensor.clusters == "dynamic" else buffer
                for tensor, buffer in zip(self.layout.tensors, self._cache, strict=True)
            ]
            self._bind_cache()

    def rewind(self, length: int) -> None:
        """Drops the tail of the cache, so that `length` tokens remain.

        Raises:
            UsageError: The cache does not hold that many, or a window has moved on since.
        """
        if not 0 <= length <= self.length:
            raise UsageError(
                f"cannot rewind to {length} of {self.length} cached tokens", where="rewind", fix="rewind to fewer"
            )
        if any(_has_dropped(tensor, length, self.length) for tensor in self.layout.tensors):
            raise UsageError(
                f"a window has dropped tokens that a context of {length} needs", where="rewind", fix="reset instead"
            )
        if self._clusters.heads and length < FIRST_TOKENS <= self.length:
            raise UsageError(
                f"clusters of heads were formed after a context of {length}", where="rewind", fix="reset instead"
            )
        self.length = length

    def keep_shared(self, held: Sequence[int], tokens: Sequence[int]) -> int:
        """Leaves in the cache what it begins with like other tokens, or nothing where a window has moved on since.

        Args:
            held: Tokens that the cache was given, and maybe more.
            tokens: Those that it should hold.

        Returns:
            The number of tokens that are left.
        """
        held = held[: self.length]
        pairs = enumerate(zip(held, tokens, strict=False))
        same = next((index for index, (old, new) in pairs if old != new), min(len(held), len(tokens)))
        try:
            self.rewind(same)
        except UsageError:
            self.reset()
        return self.length

    def fill(self, length: int, seed: int = 0) -> None:
        """Sets the cache to a context of `length` tokens with pseudo-random content, for timing without a prefill.

        Raises:
            UsageError: The cache has no room for that many.
        """
        self._require(length)
        if not self._clusters.is_formed:
            self._form_clusters()
        self._reserve(length)
        generator = np.random.default_rng(seed)
        for tensor, buffer in zip(self.layout.tensors, self._cache, strict=True):
            for sequence in buffer:
                heads_first = sequence.swapaxes(0, 1) if tensor.is_packed else sequence
                _fill(heads_first, min(tensor.rows(length), length), generator)
        self.length = length

    def step(self, tokens: Tokens) -> Logits:
        """Appends tokens to the sequences.

        Args:
            tokens: Ids of n >= 1 tokens, [n] for all sequences alike or [batch, n].

        Returns:
            The logits that follow each of them, float32 [n, vocab], or the last of them alone, [1, vocab]; of tokens
            [batch, n] these for each sequence.

        Raises:
            UsageError: There are no tokens, they exceed the capacity, or there are several for each of several
                sequences that have begun, which onnxruntime's attention does not take.
            ArtifactError: onnxruntime fails on the graph.
        """
        given = np.asarray(tokens, dtype=np.int64)
        ids = np.ascontiguousarray(np.broadcast_to(given, (self.batch, given.shape[-1])))
        count = ids.shape[1]
        if count == 0:
            raise UsageError("no tokens to run", where="tokens", fix="pass at least one token id")
        if min(self.batch, count) > 1 and self.length:
            raise UsageError("a batch goes on token by token", where="tokens", fix="pass one token per sequence")
        self._require(self.length + count)
        first = 0 if self._clusters.is_formed else FIRST_TOKENS - self.length
        pieces = [ids[:, :first], ids[:, first:]] if 0 < first < count else [ids]
        logits = [self._run(piece) for piece in pieces]
        found = logits[-1] if self._last_only else np.concatenate(logits, axis=1)
        return found if given.ndim == 2 else found[0]

    def _run(self, ids: npt.NDArray[np.int64]) -> Logits:
        """Logits [batch, n, vocab] of tokens [batch, n] that are appended in one run of the graph."""
        count = ids.shape[1]
        total = self.length + count
        logits = np.empty((self.batch, 1 if self._last_only else count, self.vocab), dtype=np.float32)
        self._reserve(total)
        self._bind_tokens(ids, total)
        self._bind_codes(total)
        attentions = self._bind_attentions(count)
        self._binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
        try:
            self._session.run_with_iobinding(self._binding)
        except ORT_ERRORS as error:
            raise artifact_error(f"onnxruntime failed on tokens {self.length}..{total}", error, self._where) from error
        for layer, weights in attentions.items():
            self._clusters.see(layer, self.length, weights[0])
        self.length = total
        if attentions and total >= FIRST_TOKENS:
            self._form_clusters()
        return logits

    def prefill(self, tokens: Tokens, chunk: int | None = None) -> Logits:
        """Appends a prompt in chunks, so that memory does not grow with its length.

        Args:
            tokens: Ids of n >= 1 tokens, for all sequences alike.
            chunk: Tokens of one run; by default 512, and 64 where scores are held in memory: with packed codes and with
                clusters of heads. Several sequences run in one piece.

        Returns:
            The logits that follow the last token, float32 [vocab].

        Raises:
            UsageError: There are no tokens, or they exceed the capacity; then nothing was appended.
            ArtifactError: onnxruntime fails on the graph.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        holds_scores = any(tensor.is_packed or tensor.clusters for tensor in self.layout.tensors)
        chunk = ids.size if self.batch > 1 else chunk or (_SHORT_CHUNK if holds_scores else _CHUNK)
        self._require(self.length + ids.size)
        logits = self.step(ids[:chunk])
        for start in range(chunk, ids.size, chunk):
            logits = self.step(ids[start : start + chunk])
        return logits[-1].copy()

    def _bind_tokens(self, ids: npt.NDArray[np.int64], total: int) -> None:
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones((self.batch, total), dtype=np.int64),
            "position_ids": np.tile(np.arange(self.length, total, dtype=np.int64), (self.batch, 1)),
        }
        for name in self._inputs & inputs.keys():
            self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(inputs[name]))

    def _bind_codes(self, total: int) -> None:
        """The rows of packed codes so far as past, and the rows behind them for those that this step adds."""
        for tensor, buffer in zip(self.layout.tensors, self._cache, strict=True):
            if tensor.is_packed:
                start, stop = tensor.rows(self.length), tensor.rows(total)
                past, added = buffer[:, :start], buffer[:, start:stop]
                self._binding.bind_ortvalue_input(tensor.past, ort.OrtValue.ortvalue_from_numpy(past))
                self._binding.bind_ortvalue_output(tensor.present, ort.OrtValue.ortvalue_from_numpy(added))

    def _bind_attentions(self, count: int) -> dict[int, npt.NDArray[np.float32]]:
        """Where the weights of so many new tokens go, by layer, as long as clusters are to be formed of them."""
        if self._clusters.is_formed:
            return {}
        rows = {tensor.layer: cache.shape[2] for tensor, cache in zip(self.layout.tensors, self._cache, strict=True)}
        found = {
            layer: np.empty((1, heads, count, rows[layer]), np.float32) for layer, heads in self._clusters.heads.items()
        }
        for layer, weights in found.items():
            value = ort.OrtValue.ortvalue_from_numpy(weights)
            self._binding.bind_ortvalue_output(ATTENTIONS.format(layer), value)
        return found

    def _bind_cache(self) -> None:
        """Past and present to the buffers as they are now, and the heads that attend."""
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        for tensor, buffer in zip(self.layout.tensors, self._cache, strict=True):
            if not tensor.is_packed:
                value = ort.OrtValue.ortvalue_from_numpy(buffer)
                self._binding.bind_ortvalue_input(tensor.past, value)
                for present in (tensor.present, *shared_outputs(self._session, tensor)):
                    self._binding.bind_ortvalue_output(present, value)
        for name, heads in self._clusters.inputs().items():
            self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(heads))

    def _form_clusters(self) -> None:
        """Forms clusters of the heads, and keeps the keys of those that attend."""
        buffers = zip(self.layout.tensors, self._cache, strict=True)
        self._clusters.form({tensor.layer: buffer[0] for tensor, buffer in buffers if tensor.kind == "value"})
        self._cache = [
            np.ascontiguousarray(buffer[:, self._clusters.representatives(tensor.layer)])
            if tensor.clusters == "dynamic" and tensor.kind == "key"
            else buffer
            for tensor, buffer in zip(self.layout.tensors, self._cache, strict=True)
        ]
        self._bind_cache()

    def _buffer(self, tensor: KVTensor) -> npt.NDArray[Any]:
        """Memory for an empty cache."""
        if tensor.clusters is None:
            return _buffer(tensor, self.capacity, self.batch)
        heads = self._clusters.heads[tensor.layer] if tensor.clusters == "dynamic" else tensor.heads
        return _buffer(tensor.model_copy(update={"heads": heads}), min(_ROOM, self.capacity), self.batch)

    def _reserve(self, length: int) -> None:
        """Lets the caches of layers with clusters grow to a context of that length."""
        grown = False
        for index, (tensor, buffer) in enumerate(zip(self.layout.tensors, self._cache, strict=True)):
            if tensor.clusters is not None and buffer.shape[2] < length:
                rows = min(-(-length // _ROOM) * _ROOM, self.capacity)
                self._cache[index] = np.zeros((*buffer.shape[:2], rows, buffer.shape[3]), buffer.dtype)
                self._cache[index][:, :, : buffer.shape[2]] = buffer
                grown = True
        if grown:
            self._bind_cache()

    def _require(self, length: int) -> None:
        if length > self.capacity:
            raise UsageError(
                f"{length} tokens exceed the cache of {self.capacity}",
                where=self._where,
                fix=f"open the session with a capacity of {length} or more",
            )

    def _vocab(self) -> int:
        shapes = {node.name: node.shape for node in self._session.get_outputs()}
        missing = [tensor.present for tensor in self.layout.tensors if tensor.present not in shapes]
        vocab = shapes["logits"][-1] if shapes.get("logits") else None
        if missing or not self.layout.tensors or not isinstance(vocab, int):
            raise ArtifactError(
                f"the graph's outputs are {', '.join(shapes)}",
                where=self._where,
                fix="export with `kvslim compress`: logits [batch, length, vocab] and one present per cache input",
            )
        return vocab


def _buffer(tensor: KVTensor, capacity: int, batch: int) -> npt.NDArray[Any]:
    """Memory for caches of so many tokens."""
    rows, dtype = tensor.rows(capacity), _STORED.get(tensor.dtype, np.uint8)
    shape = (rows, tensor.heads) if tensor.is_packed else (tensor.heads, rows)
    return np.zeros((batch, *shape, tensor.columns), dtype=dtype)


def _fill(buffer: npt.NDArray[Any], rows: int, generator: np.random.Generator) -> None:
    """Sets the first rows of a buffer [heads, rows, columns]; drawing all of them would take too long."""
    heads, _, columns = buffer.shape
    content = _noise(generator, (heads, min(rows, _FILL_PERIOD), columns), buffer.dtype)
    for start in range(0, rows, _FILL_PERIOD):
        buffer[:, start : min(start + _FILL_PERIOD, rows)] = content[:, : rows - start]


def _noise(generator: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Content that a cache of a type could have."""
    if dtype == np.uint8:
        return generator.integers(256, size=shape, dtype=np.uint8)
    noise = generator.standard_normal(shape, dtype=np.float32)
    return np.clip(noise * 40, -127, 127).astype(np.int8) if dtype == np.int8 else noise


def _has_dropped(tensor: KVTensor, length: int, current: int) -> bool:
    """Whether a cache of `current` tokens lacks one that it needs when only `length` remain."""
    if tensor.window is None:
        return False
    if tensor.sinks is not None:
        return current > length and current > tensor.window + tensor.sinks
    return _kept(length, tensor.window) != _kept(current, tensor.window) - (current - length)


def _kept(tokens: int, window: int) -> int:
    """Rows that the kernel keeps of so many tokens: it drops them in blocks when the cache is full."""
    block = WINDOW_SLACK + 1
    over = max(0, tokens - window - WINDOW_SLACK)
    return tokens - block * -(-over // block)
