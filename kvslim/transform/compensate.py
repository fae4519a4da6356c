"""Output projections fitted again, so that what a compressed cache gives comes as near as can be to what it gave.

Every layer sees what the compressed layers below it give, and its output projection becomes the ridge regression from
its attention outputs there to those of the uncompressed model, in closed form, towards the projection it had. All
layers are fitted to one pass, so none sees yet what the refit of those below it mends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvslim.load.architecture import Architecture
from kvslim.transform.codes import Array, LayerCodes
from kvslim.transform.surgery import attention_modules, projection, trial

RIDGE = 1e-2  # of the inputs' mean power


def refitted(
    model: Any, architecture: Architecture, codes: tuple[LayerCodes, ...], windows: Iterable[Array]
) -> tuple[LayerCodes, ...]:
    """The codes with output projections fitted to them; layers without codes stay as they are.

    Args:
        model: The prepared model, without codes.
        architecture: Where its parts live.
        codes: One entry per layer.
        windows: Token ids [length] each.
    """
    layers = [layer for layer, code in enumerate(codes) if not code.is_empty]
    sums: dict[int, _Sums] = {}
    for window in windows:
        ids = torch.from_numpy(window[None])
        with _outputs(model, architecture) as wanted, torch.inference_mode():
            model.base_model(input_ids=ids, use_cache=False)
        with trial(model, architecture, codes), _outputs(model, architecture) as given, torch.inference_mode():
            model.base_model(input_ids=ids, use_cache=False)
            weights = {
                layer: projection(module, architecture, "output") for layer, module in _indexed(model, architecture)
            }
        for layer in layers:
            sums.setdefault(layer, _Sums(*weights[layer])).add(given[layer][0], wanted[layer][1])
    fitted = {layer: total.solve() for layer, total in sums.items()}
    return tuple(
        replace(code, output_weight=fitted[layer][0], output_bias=fitted[layer][1]) if layer in fitted else code
        for layer, code in enumerate(codes)
    )


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
        damping = RIDGE * np.trace(moments[:-1, :-1]) / (len(moments) - 1)
        ridge = np.diag([*[damping] * (len(moments) - 1), 0.0])
        change = np.linalg.solve(moments + ridge, np.asarray(self.products).T).T
        return self.weight + change[:, :-1], change[:, -1] + (0.0 if self.bias is None else self.bias)


def _indexed(model: Any, architecture: Architecture) -> Iterable[tuple[int, nn.Module]]:
    return enumerate(attention_modules(model, architecture))


@contextmanager
def _outputs(model: Any, architecture: Architecture) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within the block: input and output of each layer's output projection, as they come."""
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        attention.get_submodule(architecture.output).register_forward_hook(
            lambda _, inputs, output: seen.append((inputs[0], output))
        )
        for attention in attention_modules(model, architecture)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
