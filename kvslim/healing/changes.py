"""Trained weights as what they were and a change, counted in the size that numbers at their place have.

AdamW moves all numbers by about its rate. Codes scale the rows and columns that they fold into: of a coded
SmolLM2-135M values have rows of size 20, and the output projection behind them has columns of size 0.0005, so that no
rate serves both. In units of the size of its row and column (a product of two, as Adafactor keeps mean squares: Shazeer
and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018, section 3) each number moves by the
same share of its size, however codes are scaled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

TINY = 1e-30
Names = tuple[int, str]


class Changes:
    """What is added to weights, in units; zeros at first.

    Args:
        weights: By layer and name, matrices [out, in] and biases [out]; they are written to.

    Attributes:
        values: The changes, in the order of the weights; what an optimizer steps.
    """

    def __init__(self, weights: Mapping[Names, Tensor]) -> None:
        self._weights = list(weights.values())
        self._starts = [weight.detach().clone() for weight in self._weights]
        self._units = [_units(weights, layer, name) for layer, name in weights]
        self.values = [torch.zeros_like(start, requires_grad=True) for start in self._starts]

    def take_gradients(self) -> None:
        """Hands the gradients of the weights on to the changes."""
        for value, weight, unit in zip(self.values, self._weights, self._units, strict=True):
            value.grad = None if weight.grad is None else weight.grad * unit
            weight.grad = None

    def apply(self, values: Sequence[Tensor] | None = None) -> None:
        """Lets the weights have these changes, by default their own."""
        with torch.no_grad():
            known = zip(self._weights, self._starts, self._units, values or self.values, strict=True)
            for weight, start, unit, value in known:
                weight.copy_(start + unit * value)


def _units(weights: Mapping[Names, Tensor], layer: int, name: str) -> Tensor:
    """The sizes of a matrix's numbers: the root mean square of the row times the column's, over that of all.

    A bias has the sizes of its matrix's rows.
    """
    is_bias = name.endswith("bias")
    squares = weights[layer, f"{name.removesuffix('bias')}weight" if is_bias else name].detach().square()
    rows = squares.mean(1).sqrt()
    if is_bias:
        return rows
    return torch.outer(rows, squares.mean(0).sqrt()) / squares.mean().sqrt().clamp_min(TINY)
