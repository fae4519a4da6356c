"""Output projections fitted again, so that what a compressed cache gives comes as near as can be to what it gave.

Layer by layer from the first, each sees what the compressed and refitted layers below it give, and its output
projection becomes the ridge regression from its attention outputs there to those of the uncompressed model, in closed
form, towards the projection it had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvslim.load.architecture import Architecture
from kvslim.transform.codes import Array, LayerCodes
from kvslim.transform.surgery import attention_modules, projection, trial

RIDGE = 0.1  # of the inputs' mean power


def refitted(
    model: Any,
    architecture: Architecture,
    codes: tuple[LayerCodes, ...],
    windows: Iterable[Array],
    layers: Callable[[Iterable[int]], Iterable[int]],
) -> tuple[LayerCodes, ...]:
    """The codes with output projections fitted to them; layers without codes stay as they are.

    Args:
        model: The prepared model, without codes.
        architecture: Where its parts live.
        codes: One entry per layer.
        windows: [length] token ids each.
        layers: Wraps the iterable of layers, to show progress.
    """
    tokens = [torch.from_numpy(window[None]) for window in windows]
    plain: list[Any] = [None] * len(tokens)  # what the layer below gives, in the model as it is
    coded = plain  # and in the one with codes
    fitted: list[LayerCodes] = []
    for index in layers(range(len(codes))):
        runs = [_run(model, architecture, index, *given) for given in zip(tokens, plain, strict=True)]
        plain = [run.output for run in runs]
        with trial(model, architecture, _alone(codes[index], index, len(codes))):
            trials = [_run(model, architecture, index, *given) for given in zip(tokens, coded, strict=True)]
            sums = _Sums(*projection(attention_modules(model, architecture)[index], architecture, "output"))
        if codes[index].is_empty:
            fitted.append(codes[index])
            coded = [run.output for run in trials]
            continue
        for run, wanted in zip(trials, runs, strict=True):
            sums.add(run.attended, wanted.projected)
        weight, bias = sums.solve()
        fitted.append(replace(codes[index], output_weight=weight, output_bias=bias))
        with trial(model, architecture, _alone(fitted[index], index, len(codes))):
            coded = [_run(model, architecture, index, *given).output for given in zip(tokens, coded, strict=True)]
    return tuple(fitted)


@dataclass
class _Sums:
    """Normal equations of one layer, about the projection that it has.

    Attributes:
        weight: [hidden, inputs].
        bias: [hidden], or None.
        moments: [inputs + 1, inputs + 1] of inputs with a one behind them.
        products: [hidden, inputs + 1] of what is missing and those inputs.
    """

    weight: Array
    bias: Array | None
    moments: Array | float = 0.0
    products: Array | float = 0.0

    def add(self, inputs: Tensor, wanted: Tensor) -> None:
        """Adds [1, length, inputs] attention outputs and the [1, length, hidden] that should come of them."""
        rows = inputs[0].double().numpy()
        given = rows @ self.weight.T + (0.0 if self.bias is None else self.bias)
        rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
        self.moments = self.moments + rows.T @ rows
        self.products = self.products + (wanted[0].double().numpy() - given).T @ rows

    def solve(self) -> tuple[Array, Array]:
        """Weight and bias of the regression."""
        moments = np.asarray(self.moments)
        damping = RIDGE * np.trace(moments[:-1, :-1]) / (len(moments) - 1) + np.finfo(np.float64).tiny
        ridge = np.diag([*[damping] * (len(moments) - 1), 0.0])
        change = np.linalg.solve(moments + ridge, np.asarray(self.products).T).T
        return self.weight + change[:, :-1], change[:, -1] + (0.0 if self.bias is None else self.bias)


class _Run(NamedTuple):
    """What one layer did.

    Attributes:
        output: As the layer gives it.
        attended: [1, length, inputs], what its output projection read.
        projected: [1, length, hidden], what that gave.
    """

    output: Any
    attended: Tensor
    projected: Tensor


def _run(model: Any, architecture: Architecture, index: int, tokens: Tensor, before: Any) -> _Run:
    """One layer on what the layer below it gives; the others do nothing."""
    layers = list(model.get_submodule(architecture.layers).children())
    output = attention_modules(model, architecture)[index].get_submodule(architecture.output)
    given: list[Any] = []
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        layers[index].register_forward_hook(lambda *call: given.append(call[2])),
        output.register_forward_hook(lambda _, inputs, result: seen.append((inputs[0], result))),
    ]
    others = [layer for layer in layers if layer is not layers[index]]
    for layer in others:
        layer.forward = lambda *_, **__: given[0] if given else before
    try:
        with torch.inference_mode():
            model.base_model(input_ids=tokens, use_cache=False)
    finally:
        for layer in others:
            del layer.forward
        for hook in hooks:
            hook.remove()
    return _Run(given[0], *seen[0])


def _alone(code: LayerCodes, index: int, count: int) -> tuple[LayerCodes, ...]:
    """Codes of one layer of `count`, and none of any other."""
    return tuple(code if place == index else LayerCodes() for place in range(count))
