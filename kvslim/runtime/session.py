"""A decode loop on stock onnxruntime whose KV cache is appended in place."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from kvslim.caches.buffers import bind_all
from kvslim.contract import FIRST_LOGITS
from kvslim.errors import ArtifactError, UsageError
from kvslim.prefix import shared_length
from kvslim.runtime.opening import ORT_ERRORS, Logits, artifact_error, layer_buffers, layout_of, open_session

Tokens = Sequence[int] | Sequence[Sequence[int]] | npt.NDArray[np.int64]


class DecodeSession:
    """Sequences decoded side by side through a preallocated KV cache; one unless `batch` says more.

    Past and present are bound to the same memory, so that the attention kernel appends the new tokens instead of
    copying the cache at every step.

    Attributes:
        layout: The KV tensors of the graph.
        capacity: Tokens that the cache has room for.
        batch: Sequences that the cache has room for.
        lengths: Tokens that the cache holds of each now, [batch].
        left_out: Tokens of the text that the cache leaves out; the next token stands so much later than its row.
        vocab: Entries of one row of logits.

    Args:
        model: The `.onnx` file, or the folder that holds `model.onnx`.
        capacity: Tokens to allocate the cache for.
        threads: Threads of one operator; None leaves the choice to onnxruntime.
        all_positions: Whether to give logits of all new positions, as evaluation needs; else of the last one, if the
            graph is one of KVSlim's.
        float_activations: Whether products with quantised weights read float32; for evaluation, as it is slow.
        batch: Sequences that are decoded side by side.

    Raises:
        UsageError: The capacity is not positive, or as `allocate`.
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
        float_activations: bool = False,
        batch: int = 1,
    ) -> None:
        if capacity < 1:
            raise UsageError(f"a cache of {capacity} tokens holds nothing", where="capacity", fix="ask for 1 or more")
        self._where = str(model)
        self._session = open_session(model, threads, all_positions=all_positions, float_activations=float_activations)
        self.layout = layout_of(self._session)
        self.capacity = capacity
        self.vocab = self._vocab()
        self._last_only = next(node.shape[1] for node in self._session.get_outputs() if node.name == "logits") == 1
        self._has_choice = any(node.name == FIRST_LOGITS for node in self._session.get_overridable_initializers())
        self._inputs = {node.name for node in self._session.get_inputs()} | {FIRST_LOGITS}
        self._binding = self._session.io_binding()
        self.allocate(batch)

    def allocate(self, batch: int) -> None:
        """Replaces the cache by an empty one for another number of sequences.

        Raises:
            UsageError: There are several sequences, and packed codes or dynamic clusters.
        """
        layers = layer_buffers(self._session, self.layout, capacity=self.capacity, batch=batch)
        refusals = (layer.single_sequence for layer in layers)
        if batch > 1 and (refusal := next(filter(None, refusals), None)):
            raise UsageError(refusal[0], where=self._where, fix=refusal[1])
        self._layers, self.batch = layers, batch
        self.lengths, self.left_out = np.zeros(batch, dtype=np.int64), 0
        self._take_part(slice(0, batch))

    def sibling(self, capacity: int) -> DecodeSession:
        """Another cache, of one sequence, for the same graph, whose weights are in memory once."""
        other = copy.copy(self)
        other.capacity, other._binding = capacity, self._session.io_binding()
        other.allocate(1)
        return other

    @property
    def length(self) -> int:
        """Tokens that the cache holds of the longest sequence."""
        return int(self.lengths[self._rows].max(initial=0))

    def reset(self) -> None:
        """Empties the cache."""
        self.lengths[:] = 0
        for layer in self._layers:
            layer.reset()
        self._take_part(slice(0, self.batch))

    def drop(self, row: int) -> None:
        """Ends a sequence: runs go on without it, and the last one takes its row."""
        last = self._rows.stop - 1
        if row != last:
            self.lengths[row] = self.lengths[last]
            for layer in self._layers:
                layer.move(last, row, int(self.lengths[row]))
        self._take_part(slice(0, last))

    @property
    def lends_rows(self) -> bool:
        """Whether a cache with some of the rows of another one is one that the graph can read."""
        return all(layer.lends_rows for layer in self._layers)

    def borrow(self, other: DecodeSession, rows: slice, start: int) -> None:
        """Copies rows of a sibling's cache, to stand from row `start` on, and forgets what stood there and behind."""
        for layer, theirs in zip(self._layers, other._layers, strict=True):
            layer.borrow(theirs, rows, start)
        self.lengths[:] = start + rows.stop - rows.start

    def rewind(self, length: int) -> None:
        """Drops the tail of the cache, so that `length` tokens remain.

        Raises:
            UsageError: The cache does not hold that many, or a window has moved on since.
        """
        if not 0 <= length <= self.lengths.min():
            raise UsageError(
                f"cannot rewind to {length} of {self.length} cached tokens", where="rewind", fix="rewind to fewer"
            )
        if refusal := self.refusal(length, self.length):
            raise UsageError(refusal, where="rewind", fix="reset instead")
        for layer in self._layers:
            layer.rewind(length)
        self.lengths[:] = length

    def takes_back(self, count: int) -> bool:
        """Whether a run of `count` tokens from here could be cut to its first one."""
        return all(layer.takes_back(self.length, self.length + count) for layer in self._layers)

    def refusal(self, length: int, current: int) -> str | None:
        """Why a cache of `current` tokens could not be cut to `length`, or None if it could."""
        return next(filter(None, (layer.refusal(length, current) for layer in self._layers)), None)

    def keep_shared(self, held: Sequence[int], tokens: Sequence[int]) -> int:
        """Leaves in the cache what it begins with like other tokens, or nothing where a window has moved on since.

        Args:
            held: Tokens that the cache was given, and maybe more.
            tokens: Those that it should hold.

        Returns:
            The number of tokens that are left.
        """
        try:
            self.rewind(shared_length(held[: self.length], tokens))
        except UsageError:
            self.reset()
        return self.length

    def fill(self, length: int, seed: int = 0) -> None:
        """Sets the cache to a context of `length` tokens with pseudo-random content, for timing without a prefill.

        Raises:
            UsageError: The cache has no room for that many.
        """
        self._require(length)
        generator = np.random.default_rng(seed)
        self._rebind([layer.fill(length, generator) for layer in self._layers])
        self.lengths[:] = length

    def step(self, tokens: Tokens, last: int | None = None) -> Logits:
        """Appends tokens to the sequences.

        Args:
            tokens: Ids of n >= 1 tokens, [n] for all sequences alike or [batch, n].
            last: Tokens at the end, >= 1, whose logits are wanted; None for all. Others cost no output head.

        Returns:
            The logits that follow each of them, float32 [n, vocab], or the last of them alone, [1, vocab]; of tokens
            [batch, n] these for each sequence.

        Raises:
            UsageError: There are no tokens, they exceed the capacity, or there are several for each of several
                sequences that have begun, which onnxruntime's attention does not take.
            ArtifactError: onnxruntime fails on the graph.
        """
        given = np.asarray(tokens, dtype=np.int64)
        ids = np.ascontiguousarray(np.broadcast_to(given, (self._rows.stop - self._rows.start, given.shape[-1])))
        count = ids.shape[1]
        if count == 0:
            raise UsageError("no tokens to run", where="tokens", fix="pass at least one token id")
        if min(ids.shape) > 1 and self.length:
            raise UsageError("a batch goes on token by token", where="tokens", fix="pass one token per sequence")
        self._require(self.length + count)
        first = max(layer.pauses_after for layer in self._layers) - self.length
        pieces = [ids[:, :first], ids[:, first:]] if 0 < first < count else [ids]
        wanted = last or count
        logits = [self._run(piece, wanted) for piece in pieces]
        found = logits[-1] if self._last_only or len(logits) == 1 else np.concatenate(logits, axis=1)
        return (found if given.ndim == 2 else found[0])[..., -wanted:, :]

    def _run(self, ids: npt.NDArray[np.int64], wanted: int) -> Logits:
        """Logits [batch, m, vocab] of tokens [batch, n] that are appended in one run of the graph.

        They are those of the last `wanted` tokens, where the graph can leave others out.
        """
        batch, count = ids.shape
        length, total = self.length, self.length + count
        rows = 1 if self._last_only else min(wanted, count) if self._has_choice else count
        logits = np.empty((batch, rows, self.vocab), dtype=np.float32)
        self._rebind([layer.reserve(total) for layer in self._layers])
        self._bind_tokens(ids, rows)
        for layer in self._layers:
            layer.bind_step(self._binding, length, total)
        self._binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
        try:
            self._session.run_with_iobinding(self._binding)
        except ORT_ERRORS as error:
            raise artifact_error(f"onnxruntime failed on tokens {length}..{total}", error, self._where) from error
        self._rebind([layer.after_step(length, total) for layer in self._layers])
        self.lengths[self._rows] += count
        return logits

    def prefill(self, tokens: Tokens, chunk: int | None = None) -> Logits:
        """Appends a prompt in chunks, so that memory does not grow with its length.

        Args:
            tokens: Ids of n >= 1 tokens, for all sequences alike.
            chunk: Tokens of one run; by default 512, and 64 where scores are held in memory: with packed codes, with
                states and with clusters of heads. Several sequences run in one piece.

        Returns:
            The logits that follow the last token, float32 [vocab].

        Raises:
            UsageError: There are no tokens, or they exceed the capacity; then nothing was appended.
            ArtifactError: onnxruntime fails on the graph.
        """
        *_, logits = self.prefill_steps(tokens, chunk)
        return logits

    def prefill_steps(self, tokens: Tokens, chunk: int | None = None) -> Iterator[Logits]:
        """Does what `prefill` does, one chunk for each of the logits that it yields, so that a caller can stop between.

        Args:
            tokens: As for `prefill`.
            chunk: As for `prefill`.

        Yields:
            The logits that follow the last token of a chunk, float32 [vocab].

        Raises:
            UsageError, ArtifactError: As `prefill`.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        alone = self._rows.stop - self._rows.start == 1
        size = (chunk or min(layer.prefill_chunk for layer in self._layers)) if alone else ids.size
        self._require(self.length + ids.size)
        yield self.step(ids[:size], last=1)[-1].copy()
        for start in range(size, ids.size, size):
            yield self.step(ids[start : start + size], last=1)[-1].copy()

    def prefill_each(self, prompts: Sequence[Tokens]) -> Logits:
        """Starts each of as many sequences with a prompt of its own, of any length.

        Prompts run one after another: padding would cost time, and chunks keep memory small.

        Args:
            prompts: Ids of n >= 1 tokens each, at most `batch` prompts.

        Returns:
            The logits that follow each prompt, float32 [prompts, vocab].

        Raises:
            UsageError, ArtifactError: As `prefill`.
        """
        self.reset()
        logits = np.empty((len(prompts), self.vocab), dtype=np.float32)
        for row, prompt in enumerate(prompts):
            self._take_part(slice(row, row + 1))
            logits[row] = self.prefill(prompt)
        self._take_part(slice(0, len(prompts)))
        return logits

    def _bind_tokens(self, ids: npt.NDArray[np.int64], rows: int) -> None:
        """Binds all inputs but the cache; memory that is bound already takes values of the same shape."""
        rows_of = self.lengths[self._rows, None] + np.arange(ids.shape[1])
        totals = rows_of[:, -1:] + 1
        inputs = {
            "input_ids": ids,
            "attention_mask": (np.arange(totals.max()) < totals).astype(np.int64),
            "position_ids": rows_of + self.left_out,
        }
        if self._has_choice:
            inputs[FIRST_LOGITS] = np.array([-rows], dtype=np.int64)
        for name, value in inputs.items():
            held = self._bound.get(name)
            if held is not None and held.shape == value.shape:
                held[:] = value
            elif name in self._inputs:
                self._bound[name] = value.copy()  # of tokens that are the caller's
                self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(self._bound[name]))

    def _rebind(self, changed: Sequence[bool]) -> None:
        """Binds the buffers again where any of them is another now."""
        if any(changed):
            self._take_part(self._rows)

    def _take_part(self, rows: slice) -> None:
        """Lets the next runs be of these sequences alone."""
        self._rows, self._bound = rows, dict[str, npt.NDArray[np.int64]]()
        bind_all(self._binding, self._layers, rows)

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
