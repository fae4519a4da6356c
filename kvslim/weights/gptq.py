"""GPTQ: rounds a matrix column by column, and lets the columns that are left make up for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023, section 3
and algorithm 1. The error of a rounded matrix is tr(E H E^T), with H the second moments of the inputs. What rounding a
column leaves moves the optimum of all later ones by the rows of the Cholesky factor of H^-1. The step and zero point of
a block are searched when its first column is reached, on the numbers as they are by then.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvslim.weights.blocks import BLOCK, Floats, Quantised, search

# Added to the diagonal of H, in parts of its mean. The paper has 0.01; a few thousand tokens estimate H less well.
DAMPING = 0.1
PANEL = 4 * BLOCK  # columns whose updates reach the rest of the matrix at once


def gptq(matrix: Floats, moments: npt.NDArray[np.float64], bits: int) -> Quantised:
    """Quantises a matrix [n, k], a row per output.

    Args:
        matrix: The numbers.
        moments: [k, k], the sums of x x^T over inputs x; any multiple of them will do.
        bits: Of an integer, 4 or 8.
    """
    rows, width = matrix.shape
    numbers = torch.from_numpy(np.pad(matrix, ((0, 0), (0, -width % BLOCK))).astype(np.float32))
    damped = _damped(moments, numbers.shape[1])
    factor = _inverse_factor(damped)
    importance = damped.diagonal().astype(np.float32)
    integers = torch.zeros_like(numbers)
    scales, zeros = (torch.zeros(rows, numbers.shape[1] // BLOCK) for _ in range(2))
    for start in range(0, numbers.shape[1], PANEL):
        panel = slice(start, start + PANEL)
        errors = _round_panel(
            numbers[:, panel],
            factor[panel, panel],
            importance[panel],
            bits,
            integers[:, panel],
            scales[:, start // BLOCK :],
            zeros[:, start // BLOCK :],
        )
        numbers[:, start + PANEL :] -= errors @ factor[panel, start + PANEL :]
    return Quantised.of(integers.numpy(), scales.numpy(), zeros.numpy(), bits)


def _round_panel(
    numbers: Tensor, factor: Tensor, importance: Floats, bits: int, integers: Tensor, scales: Tensor, zeros: Tensor
) -> Tensor:
    """Rounds some blocks of columns, filling the last three; returns their errors over the factor's diagonal."""
    errors = torch.zeros_like(numbers)
    for column in range(numbers.shape[1]):
        block = column // BLOCK
        if column % BLOCK == 0:
            part = slice(column, column + BLOCK)
            weights = np.broadcast_to(importance[part], (len(numbers), BLOCK))
            _, found, middle = search(np.ascontiguousarray(numbers[:, part].numpy()), bits, weights)
            scales[:, block], zeros[:, block] = torch.from_numpy(found[:, 0]), torch.from_numpy(middle[:, 0])
        scale, zero = scales[:, block], zeros[:, block]
        wanted = torch.where(scale == 0, 0, numbers[:, column] / scale)
        integers[:, column] = wanted.round().clamp(-zero, 2**bits - 1 - zero)
        errors[:, column] = (numbers[:, column] - scale * integers[:, column]) / factor[column, column]
        numbers[:, column:] -= errors[:, column, None] * factor[column, column:]
    return errors


def _damped(moments: npt.NDArray[np.float64], width: int) -> npt.NDArray[np.float64]:
    """The moments [width, width] of inputs filled up with noise of their mean size, and a little noise on all."""
    padded = np.zeros((width, width))
    padded[: len(moments), : len(moments)] = moments
    size = float(np.trace(moments)) / len(moments) or 1.0
    diagonal = np.einsum("ii->i", padded)
    diagonal += DAMPING * size
    return padded


def _inverse_factor(moments: npt.NDArray[np.float64]) -> Tensor:
    """The upper Cholesky factor of the moments' inverse."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(torch.from_numpy(moments)))
    return torch.linalg.cholesky(inverse, upper=True).float()
