"""GPTQ: rounds a matrix column by column, and lets the columns that are left make up for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023, section 3
and algorithm 1. The error of a rounded matrix is tr(E H E^T), with H the second moments of the inputs. What rounding a
column leaves moves the optimum of all later ones by the rows of the Cholesky factor of H^-1. The step and zero point of
a block are searched when its first column is reached, on the numbers as they are by then.

What is rounded first is made up for most. So blocks come in the order of their inputs' mean size, and in a block the
columns in that of theirs. That is the order of GPTQ's authors (`act-order` in their code) as far as blocks allow.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvslim.weights.blocks import BlockFormat, Floats, Quantised, search, stacked

# Added to the diagonal of H, in parts of its mean. The paper has 0.01; a few thousand tokens estimate H less well.
DAMPING = 0.1
PANEL = 128  # columns whose updates reach the rest of the matrix at once
ROWS = 2048  # rows that are rounded at a time; a panel of them fits a processor's cache


def gptq(matrix: Floats, moments: npt.NDArray[np.float64], to: BlockFormat) -> Quantised:
    """Quantises a matrix [n, k], a row per output.

    Args:
        matrix: The numbers.
        moments: [k, k], the sums of x x^T over inputs x; any multiple of them will do.
        to: Bits and block size.
    """
    damped = _damped(moments, len(moments) + to.padding(len(moments)))
    order = _order(damped.diagonal(), to.block)
    damped = damped[np.ix_(order, order)]
    factor, importance = _inverse_factor(damped), damped.diagonal().astype(np.float32)
    chunks = (matrix[start : start + ROWS] for start in range(0, len(matrix), ROWS))
    return stacked([_round(chunk, order, factor, importance, to) for chunk in chunks])


def _order(sizes: npt.NDArray[np.float64], block: int) -> npt.NDArray[np.int64]:
    """Columns by the size of their inputs, the largest first, and so their blocks, which stay together."""
    blocks = sizes.reshape(-1, block)
    inside = np.argsort(-blocks, axis=1, kind="stable") + block * np.arange(len(blocks))[:, None]
    return inside[np.argsort(-blocks.mean(1), kind="stable")].ravel()


def _round(
    matrix: Floats, order: npt.NDArray[np.int64], factor: Tensor, importance: Floats, to: BlockFormat
) -> Quantised:
    """Rounds some rows; here a column of the matrix is a row of its transpose, which lies together in memory."""
    padded = np.pad(matrix.T, ((0, to.padding(matrix.shape[1])), (0, 0)))[order]
    columns = torch.from_numpy(np.ascontiguousarray(padded, dtype=np.float32))
    integers = torch.zeros_like(columns)
    scales, zeros = (torch.zeros(len(columns) // to.block, len(matrix)) for _ in range(2))
    for start in range(0, len(columns), PANEL):
        panel = slice(start, start + PANEL)
        errors = torch.zeros_like(columns[panel])
        for column in range(start, min(start + PANEL, len(columns))):
            block = column // to.block
            if column % to.block == 0:
                scales[block], zeros[block] = _step_and_zero(columns, importance, column, to)
            wanted = torch.where(scales[block] == 0, 0, columns[column] / scales[block])
            integers[column] = wanted.round_().clamp_(-zeros[block], 2**to.bits - 1 - zeros[block])
            error = (columns[column] - scales[block] * integers[column]) / factor[column, column]
            columns[column : start + PANEL].addr_(factor[column, column : start + PANEL], error, alpha=-1)
            errors[column - start] = error
        columns[start + PANEL :] -= factor[panel, start + PANEL :].T @ errors
    places, blocks = np.argsort(order), np.argsort(order[:: to.block] // to.block)
    by_row = [part[at].T.contiguous().numpy() for part, at in ((integers, places), (scales, blocks), (zeros, blocks))]
    return Quantised.of(by_row[0], by_row[1], by_row[2], to.bits)


def _step_and_zero(columns: Tensor, importance: Floats, first: int, to: BlockFormat) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row for the block that begins with a column."""
    part = slice(first, first + to.block)
    blocks = columns[part].T.contiguous().numpy()
    _, scales, zeros = search(blocks, to.bits, np.broadcast_to(importance[part], blocks.shape))
    return torch.from_numpy(scales[:, 0]), torch.from_numpy(zeros[:, 0])


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
