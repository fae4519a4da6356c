"""Rotary position embedding on samples and on second moments, in closed form over a whole context.

A head rotates coordinate pairs (i, i + rotary_dim / 2); the others pass through. In the complex eigenbasis of that
rotation a position is a phase, so averaging a moment over all positions of a context multiplies each of its entries
by the mean phase difference, a Dirichlet kernel.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def rotate(vectors: Array, positions: Array, frequencies: Array) -> Array:
    """Applies RoPE.

    Args:
        vectors: [..., tokens, head_dim], before rotation.
        positions: [tokens] or broadcastable to [..., tokens]; negative positions undo a rotation.
        frequencies: [rotary_dim / 2], radians per position; empty when the model has no RoPE.

    Returns:
        The rotated vectors, shaped as given.
    """
    half = len(frequencies)
    angle = np.asarray(positions, dtype=np.float64)[..., None] * frequencies
    cos, sin = np.cos(angle), np.sin(angle)
    first, second = vectors[..., :half], vectors[..., half : 2 * half]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, vectors[..., 2 * half :]], axis=-1)


def mean_phase(frequency: Array, context: int) -> Array:
    """Mean of exp(j * frequency * t) over the positions t = 0 .. context - 1."""
    sine = np.sin(frequency / 2)
    still = np.abs(sine) < 1e-12
    ratio = np.sin(context * frequency / 2) / (context * np.where(still, 1.0, sine))
    return np.where(still, 1.0, ratio * np.exp(1j * frequency * (context - 1) / 2))


def average_moment(moment: Array, frequencies: Array, context: int) -> Array:
    """Second moment after RoPE, averaged over all positions of a context.

    Args:
        moment: [..., head_dim, head_dim], E[x x^T] before RoPE, x independent of its position.
        frequencies: [rotary_dim / 2], radians per position.
        context: Positions to average over, in tokens.

    Returns:
        [..., head_dim, head_dim], the mean over t of R_t E[x x^T] R_t^T.
    """
    return average_product(moment, (frequencies, frequencies), context)


def average_product(moment: Array, frequencies: tuple[Array, Array], context: int) -> Array:
    """E[x y^T] of vectors of one token after RoPE, each by frequencies of its own, averaged over a context's positions.

    Args:
        moment: [..., head_dim, head_dim], E[x y^T] before RoPE.
        frequencies: Of x and of y, [rotary_dim / 2] radians per position each.
        context: Positions to average over, in tokens.

    Returns:
        [..., head_dim, head_dim], the mean over t of R_t E[x y^T] S_t^T, with R and S the two rotations.
    """
    (left, slow), (right, fast) = (_eigenbasis(moment.shape[-1], each) for each in frequencies)
    averaged = (left @ moment @ right.conj().T) * mean_phase(slow[:, None] - fast[None, :], context)
    return np.asarray((left.conj().T @ averaged @ right).real)


def average_mean(mean: Array, frequencies: Array, context: int) -> Array:
    """Mean after RoPE over all positions of a context; shapes as in `average_moment`, less the last axis."""
    basis, phases = _eigenbasis(mean.shape[-1], frequencies)
    averaged = (mean @ basis.T) * mean_phase(phases, context)
    return (averaged @ basis.conj()).real


def _eigenbasis(head_dim: int, frequencies: Array) -> tuple[Array, Array]:
    """The unitary matrix that diagonalises RoPE, [head_dim, head_dim], and the phase speed of each of its rows."""
    half = len(frequencies)
    basis = np.eye(head_dim, dtype=np.complex128)
    pairs = np.arange(half)
    basis[pairs, pairs] = basis[pairs + half, pairs] = np.sqrt(0.5)
    basis[pairs, pairs + half] = 1j * np.sqrt(0.5)
    basis[pairs + half, pairs + half] = -1j * np.sqrt(0.5)
    return basis, np.concatenate([frequencies, -np.asarray(frequencies), np.zeros(head_dim - 2 * half)])
