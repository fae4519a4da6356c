"""How far a model with codes is from itself without, in torch, before any graph is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvslim.loading.architecture import Architecture
from kvslim.transform.device import where
from kvslim.transform.edits import Array, Codes
from kvslim.transform.hooks import attached
from kvslim.transform.surgery import layer_modules, trial

BATCH = 1024  # tokens of a forward pass
SMALL_VOCABULARY = 2**14
LARGE = 2**26  # parameters
COMPARED = 2**20  # numbers compared at a time; what is in between then fits a processor's cache


class KLEvaluator:
    """Divergence from the model as it is, on a few windows of text.

    What the layers give without codes is remembered, so that a trial costs only the layers from the first changed one.

    Args:
        model: The prepared model, without codes.
        architecture: Where its parts live.
        windows: [n, length] token ids.
        loss_mask: [n, length] bool, the tokens whose prediction counts; None for all.
        probing: Whether divergence is taken at every other token alone, where a large vocabulary makes that costly.
    """

    def __init__(
        self,
        model: Any,
        architecture: Architecture,
        windows: Array,
        loss_mask: Array | None = None,
        *,
        probing: bool = False,
    ) -> None:
        self.model, self.architecture = model, architecture
        counted = predicting(windows, loss_mask)
        is_costly = probing and model.config.vocab_size > SMALL_VOCABULARY
        self.stride = 2 if is_costly and counted[:, 1::2].any() else 1
        self.layers = layer_modules(model, architecture)
        self.length = windows.shape[1]
        self.batches = torch.from_numpy(windows).to(model.device).split(max(1, BATCH // self.length))
        weights = torch.from_numpy(counted[:, self.stride - 1 :: self.stride])
        self._weights = weights.to(model.device).split(max(1, BATCH // self.length))
        self._outputs: list[list[Any]] = []
        self._reference: list[Tensor] = []
        for batch in self.batches:
            with remembering(self.layers) as outputs:
                self._reference.append(log_probabilities(self._logits(batch)))
            self._outputs.append(outputs)

    def kl(self, codes: Codes) -> float:
        """Mean KL(model || model with codes), nats per token."""
        first = first_changed(codes)
        if first is None:
            return 0.0
        with trial(self.model, self.architecture, codes):
            return self.kl_from(first)

    def kl_from(self, first: int) -> float:
        """Mean KL(model as it was || as it is now), nats per token.

        Args:
            first: The first layer that is not as it was; the number of layers where only the head is not.
        """
        total = 0.0
        known = zip(self.batches, self._weights, self._outputs, self._reference, strict=True)
        for batch, weights, outputs, reference in known:
            with replaying(self.layers[:first], outputs):
                student = self._logits(batch)
            total += summed_kl(reference, student, weights)
        return max(total / sum(int(weights.sum()) for weights in self._weights), 0.0)

    def _logits(self, batch: Tensor) -> Tensor:
        places = torch.arange(self.stride - 1, batch.shape[1], self.stride)
        with where(self.model), torch.inference_mode():
            return logits_at(self.model, batch, places)


def first_changed(codes: Codes) -> int | None:
    """The first layer that computes otherwise with codes; None where none does."""
    changed = (layer if code.source is None else code.source for layer, code in enumerate(codes) if not code.is_empty)
    return min(changed, default=None)


def logits_at(model: Any, batch: Tensor, places: Tensor) -> Tensor:
    """Logits [n, places, vocab] at some places of a batch [n, length]: those of all others would cost more than layers.

    Args:
        model: A decoder.
        batch: Token ids.
        places: Of the positions, in order.
    """
    with model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0][:, places],)):
        logits: Tensor = model(input_ids=batch, use_cache=False).logits
    return logits


def log_probabilities(logits: Tensor) -> Tensor:
    """The log probabilities of logits [..., vocab], in their memory."""
    with torch.inference_mode():
        for rows in _pieces(logits):
            rows.copy_(rows.log_softmax(-1))
    return logits


def summed_kl(teacher: Tensor, student: Tensor, counted: Tensor) -> float:
    """KL(teacher || student) over the places that count.

    With a large vocabulary logits are the most of what a small model takes, so there is no copy of them.

    Args:
        teacher: Log probabilities [n, places, vocab].
        student: Logits of the same shape.
        counted: [n, places] bool.
    """
    total = 0.0
    weights = counted.flatten().split(_rows(student))
    for of, by, counts in zip(_pieces(teacher), _pieces(student), weights, strict=True):
        total += float(((of.exp() * (of - by.log_softmax(-1))).sum(-1).double() * counts).sum())
    return total


def _pieces(logits: Tensor) -> Sequence[Tensor]:
    """Rows of logits [..., vocab] that are taken at a time, in their memory."""
    return logits.view(-1, logits.shape[-1]).split(_rows(logits))


def _rows(logits: Tensor) -> int:
    return max(1, COMPARED // logits.shape[-1])


def predicting(windows: Array, loss_mask: Array | None) -> Array:
    """[n, length] bool, the positions whose prediction counts.

    Args:
        windows: [n, length] token ids.
        loss_mask: [n, length] bool, the tokens whose prediction counts; None for all.
    """
    following = np.ones(windows.shape, bool)
    if loss_mask is not None and loss_mask[:, 1:].any() and not loss_mask.all():
        following[:, :-1], following[:, -1] = loss_mask[:, 1:], False
    return following


@contextmanager
def remembering(layers: Sequence[Any]) -> Iterator[list[Any]]:
    """Within the block what layers give is noted, in the order that they run."""
    outputs: list[Any] = []
    with attached(layer.register_forward_hook(lambda *call: outputs.append(call[2])) for layer in layers):
        yield outputs


@contextmanager
def replaying(layers: Sequence[Any], outputs: Sequence[Any]) -> Iterator[None]:
    """Within the block layers give what they gave before; outputs beyond their number are left alone."""
    try:
        for layer, output in zip(layers, outputs, strict=False):
            layer.forward = lambda *_, output=output, **__: output
        yield
    finally:
        for layer in layers:
            del layer.forward


def is_large(model: Any) -> bool:
    """Whether a pass of a model over some hundred tokens takes a second or more, so that probes must be few."""
    return bool(model.num_parameters() >= LARGE)


def probe_windows(windows: Array, layers: int, *, large: bool) -> Array:
    """So much of the windows that many probes stay quick: the deeper the model the less, at least two of 256 tokens.

    Of a large model it is one at least: with half of the text plans lose 0 to 5 % more (SmolLM2-135M, 4 to 16 times
    smaller).

    Args:
        windows: [n, length] token ids.
        layers: Of the model; each is probed several times.
        large: Whether the model is; see `is_large`.
    """
    least = 1 if large else 2
    tokens = max(least * 256, 2**17 // layers**2)
    length = min(windows.shape[1], 512, max(256, tokens // 2))
    return np.ascontiguousarray(windows[: max(least, tokens // length), :length])


def held_out_windows(windows: Array, vocab_size: int) -> Array:
    """So many of the windows that the logits of all their tokens stay small, but of 1,024 tokens at least.

    Args:
        windows: [n, length] token ids; a long text is taken whole, since that is what it was asked for.
        vocab_size: Entries of one row of logits.
    """
    tokens = max(BATCH, min(2**26 // vocab_size, 2**12))
    return np.ascontiguousarray(windows[: max(1, tokens // windows.shape[1])])
