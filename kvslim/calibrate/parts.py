"""Statistics of what each part of a layer adds to the hidden states, and of what is inside feed-forward parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvslim.loading.architecture import Architecture
from kvslim.transform.hooks import attached
from kvslim.transform.surgery import layer_modules


class PartsRecorder:
    """Sums of one layer, over all tokens but the first eighth of a window, which have little to attend to.

    Args:
        multiplier: What the family multiplies by before it adds.
    """

    def __init__(self, multiplier: float) -> None:
        self.multiplier = multiplier
        self.before: Tensor | None = None
        self.added: dict[str, Tensor] = {}
        self.inner: Tensor | None = None
        self.columns: Tensor | None = None
        self.sums: dict[str, Tensor] = {}
        self.tokens = 0

    def hear(self, name: str, output: Tensor) -> None:
        """Keeps what a part adds, until the layer ends."""
        self.added[name] = output

    def hear_inner(self, down: Any, inputs: tuple[Tensor, ...]) -> None:
        """Keeps what the last projection of the feed-forward part reads, and what its columns make of it."""
        self.inner = inputs[0]
        if self.columns is None:
            self.columns = down.weight.detach().double().square().sum(0)

    def enter(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Keeps the hidden states that the layer reads."""
        self.before = arguments[0] if arguments else keywords["hidden_states"]

    def leave(self, after: Tensor) -> None:
        """Adds one window."""
        assert self.before is not None  # the layer was entered
        first, width = after.shape[1] // 8, after.shape[-1]
        before, after = (states[:, first:].reshape(-1, width).double() for states in (self.before, after))
        attention, mlp = (
            self.added[name].reshape(self.before.shape)[:, first:].reshape(-1, width).double()
            for name in ("attention_mean", "mlp_mean")
        )
        pairs = (before, before + self.multiplier * attention), (after - self.multiplier * mlp, after), (before, after)
        cosines = [torch.cosine_similarity(*pair, dim=-1) for pair in pairs]
        assert self.inner is not None
        assert self.columns is not None
        inner = self.inner.reshape(*self.before.shape[:2], -1)[:, first:].flatten(0, 1).double()
        square = inner.square().sum(0)
        amounts = {
            "attention_mean": attention.sum(0),
            "mlp_mean": mlp.sum(0),
            "influence": torch.stack([(1 - cosine).sum() for cosine in cosines]),
            "inner_mean": inner.sum(0),
            "inner_square": square,
            "inner_added": square * self.columns,
        }
        self.sums = {name: self.sums.get(name, 0) + amount for name, amount in amounts.items()}
        self.tokens += len(after)
        self.before, self.added, self.inner = None, {}, None  # of all layers together they are large

    def finish(self) -> dict[str, np.ndarray]:
        """Means by field of the statistics."""
        return {name: (total / self.tokens).cpu().numpy() for name, total in self.sums.items()}


@contextlib.contextmanager
def parts_recorded(model: Any, architecture: Architecture) -> Iterator[list[PartsRecorder]]:
    """Within the block every forward pass is added to one recorder per layer."""
    recorders, hooks = [], []
    for layer in layer_modules(model, architecture):
        recorder = PartsRecorder(architecture.multiplier(model.config))
        recorders.append(recorder)
        hooks += _attached(layer, architecture, recorder)
    with attached(hooks):
        yield recorders


def _attached(layer: nn.Module, architecture: Architecture, recorder: PartsRecorder) -> list[Any]:
    hooks: list[Any] = [
        layer.register_forward_pre_hook(lambda _, *call: recorder.enter(*call), with_kwargs=True),
        layer.register_forward_hook(lambda *call: recorder.leave(call[2])),
    ]
    for name, path in zip(("attention_mean", "mlp_mean"), architecture.added, strict=True):
        module = layer.get_submodule(path)
        hooks.append(module.register_forward_hook(lambda *call, name=name: recorder.hear(name, call[2])))
    return [*hooks, layer.get_submodule(architecture.down).register_forward_pre_hook(recorder.hear_inner)]
