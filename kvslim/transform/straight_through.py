"""Rounding that gradients pass through.

What is rounded has no slope, so training takes the slope of what was there before: the straight-through estimator
(Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation", 2013,
section 2.3). The numbers themselves stay those of the kernel, to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def through(exact: Tensor, rounded: Tensor) -> Tensor:
    """The rounded numbers, with the gradients of the exact ones while a model is trained.

    Args:
        exact: Any shape.
        rounded: The same shape.
    """
    if not (torch.is_grad_enabled() and exact.requires_grad):
        return rounded
    found: Tensor = _Through.apply(exact, rounded)
    return found


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, __: Tensor, rounded: Tensor) -> Tensor:
        return rounded.detach().clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
