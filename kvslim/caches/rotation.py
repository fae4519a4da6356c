"""Randomised Hadamard rotations: the rows are the role hypervectors that `kv_hdc` bundles coordinates over.

A rotation spreads what each coordinate holds over all of them evenly, and its transpose undoes it.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def rotation(order: int, seed: int) -> Array:
    """A rotation [order, order]: orthogonal, all entries of one size, signs drawn from `seed`.

    Raises:
        ValueError: No construction here gives that order; all multiples of 8 up to 128 have one.
    """
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], order)
    found: Array = hadamard(order) * signs / np.sqrt(order)
    return found


def has_rotation(order: int) -> bool:
    """Whether there is a construction of that order."""
    while order > 1:
        if order % 4 == 0 and (_is_prime(order - 1) or (order % 8 == 4 and _is_prime(order // 2 - 1))):
            return True
        if order % 2:
            return False
        order //= 2
    return True


def hadamard(order: int) -> Array:
    """A Hadamard matrix: by doubling (Sylvester 1867), or from the quadratic residues of a prime (Paley 1933).

    Raises:
        ValueError: As `rotation`.
    """
    if order == 1:
        return np.ones((1, 1))
    if order % 4 == 0 and _is_prime(order - 1):
        return _paley_first(order - 1)
    if order % 8 == 4 and _is_prime(order // 2 - 1):
        return _paley_second(order // 2 - 1)
    if order % 2:
        raise ValueError(f"no Hadamard matrix of order {order}")
    return np.kron([[1.0, 1.0], [1.0, -1.0]], hadamard(order // 2))


def _paley_first(prime: int) -> Array:
    """Order prime + 1, for a prime that is 3 modulo 4."""
    skew = _bordered(prime)
    skew[1:, 0] = -1
    return skew + np.eye(prime + 1)


def _paley_second(prime: int) -> Array:
    """Order 2 (prime + 1), for a prime that is 1 modulo 4."""
    symmetric = _bordered(prime)
    ones, turned = np.array([[1.0, 1.0], [1.0, -1.0]]), np.array([[1.0, -1.0], [-1.0, -1.0]])
    return np.asarray(np.kron(symmetric, ones) + np.kron(np.eye(prime + 1), turned))


def _bordered(prime: int) -> Array:
    """The quadratic characters of all differences modulo a prime, with a border of ones."""
    residues = {value * value % prime for value in range(1, prime)}
    character = np.array([0] + [1 if value in residues else -1 for value in range(1, prime)])
    values = np.arange(prime)
    matrix = np.ones((prime + 1, prime + 1))
    matrix[0, 0] = 0
    matrix[1:, 1:] = character[(values[None] - values[:, None]) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
