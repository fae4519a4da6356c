"""Quantises a decoder layer by layer, each on the inputs that the quantised layers before it give.

One layer's moments are in memory at a time, and the hidden states of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvslim.progress import Progress
from kvslim.transform.hooks import hooked
from kvslim.weights.blocks import Floats, Quantised, quantise
from kvslim.weights.choice import Chosen
from kvslim.weights.gptq import gptq

Set = Callable[[str, Quantised], None]


def quantise_on_text(
    model: Any,
    layers: Sequence[nn.Module],
    chosen: Mapping[str, Chosen],
    windows: np.ndarray,
    put: Set,
    progress: Progress,
) -> None:
    """Rounds with GPTQ what is in the layers and the head, and all else, such as the embedding, with `k_quant`.

    Args:
        model: A decoder; `put` edits it.
        layers: Its layers, in order.
        chosen: Modules to quantise, by name.
        windows: [n, length] token ids.
        put: Takes a module's name and its blocks, and lets the model compute with them.
        progress: Receives the progress.
    """
    names = {entry.module: name for name, entry in chosen.items()}
    inside = [[module for module in layer.modules() if module in names] for layer in layers]
    head = [module for module in [model.get_output_embeddings()] if module in names]
    passed = {module for modules in (*inside, head) for module in modules}
    for name, entry in chosen.items():
        if entry.module not in passed:
            put(name, quantise(_matrix(entry.module), entry.to, "k_quant"))
    with torch.no_grad():  # what is made here stays in the model, which is exported
        calls = _Calls(model, layers, windows)
        for layer, modules in progress.track(list(zip(range(len(layers)), inside, strict=True)), "layers"):
            with _moments(modules) as moments:
                calls.run(layer)
            for module in modules:
                put(names[module], gptq(_matrix(module), moments[module], chosen[names[module]].to))
            calls.advance(layer)
        for module in head:
            with _moments([module]) as moments:
                _run(model, windows)
            put(names[module], gptq(_matrix(module), moments[module], chosen[names[module]].to))


class _Calls:
    """The hidden states before one layer after the other, and what else the layers are called with."""

    def __init__(self, model: Any, layers: Sequence[nn.Module], windows: np.ndarray) -> None:
        self.layers = layers
        self.options: list[dict[str, Any]] = []
        self.hidden: list[Tensor] = []
        with hooked(layers, self._keep_options):
            model.base_model(input_ids=torch.from_numpy(windows[:1]), use_cache=False)
        with hooked(layers[:1], self._keep_hidden):
            for window in windows:
                with suppress(_EnoughError):
                    model.base_model(input_ids=torch.from_numpy(window[None]), use_cache=False)

    def run(self, layer: int) -> list[Tensor]:
        """What a layer gives for each window."""
        results = [self.layers[layer](hidden, **self.options[layer]) for hidden in self.hidden]
        return [result[0] if isinstance(result, tuple) else result for result in results]

    def advance(self, layer: int) -> None:
        """Goes on to the layer behind one."""
        self.hidden = self.run(layer)

    def _keep_options(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.options.append({name: value for name, value in kwargs.items() if name != "hidden_states"})

    def _keep_hidden(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.hidden.append(args[0] if args else kwargs["hidden_states"])
        raise _EnoughError


class _EnoughError(Exception):
    """Stops a forward pass whose rest is not needed."""


def _run(model: Any, windows: np.ndarray) -> None:
    """Runs a decoder up to its head, whose hook comes first."""
    with hooked([model.get_output_embeddings()], _stop):
        for window in windows:
            with suppress(_EnoughError):
                model(input_ids=torch.from_numpy(window[None]), use_cache=False)


def _stop(*_: Any) -> None:
    raise _EnoughError


@contextmanager
def _moments(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, np.ndarray]]:
    """Within the block, sums of x x^T over the inputs of modules, [inputs, inputs]; modules of one input share them."""
    sums: dict[nn.Module, np.ndarray] = {}
    last: list[Any] = [None, None]  # an input, and its product

    def add(module: nn.Module, args: tuple[Tensor, ...], _: dict[str, Any]) -> None:
        if args[0] is not last[0]:
            rows = args[0].flatten(0, -2)
            last[:] = args[0], (rows.T @ rows).double().numpy()
        sums[module] = sums[module] + last[1] if module in sums else last[1]

    with hooked(modules, add):
        yield sums


def _matrix(module: Any) -> Floats:
    numbers: Floats = module.weight.detach().numpy()
    return numbers
