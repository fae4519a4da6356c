"""The window draft: the model itself, over a few rows of the cache that it has anyway.

It reads attention sinks and recent tokens, whose rows it copies from the cache of the model, so it needs no weights, no
prompt and no training of its own. Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023; Du et
al., "GLIDE with a CAPE", 2024, for a draft that reads the cache of its target.
"""

from __future__ import annotations

import numpy as np

from kvslim.runtime.opening import Logits
from kvslim.runtime.session import DecodeSession

ROOM = 64  # rows behind the window that are filled before it moves


class WindowDraft:
    """A small cache of rows of another one, for the same graph.

    Attributes:
        rows: Rows that a proposal reads at least.

    Args:
        target: The session whose text goes on; its graph takes positions.
        window: Recent tokens to read.
        sinks: First tokens to read.
    """

    def __init__(self, target: DecodeSession, window: int, sinks: int) -> None:
        self.rows = window + sinks
        self._target, self._window, self._sinks = target, window, sinks
        self._session = target.sibling(self.rows + 2 * ROOM)
        self.reset()

    def reset(self) -> None:
        """Forgets the text."""
        self._held = 0  # tokens of the target's cache up to which rows were copied
        self._session.lengths[:], self._session.left_out = 0, 0

    def follow(self) -> None:
        """Takes over the rows that the target's cache has got, and drops those of tokens that were only proposed."""
        length, left_out = self._target.length, self._session.left_out
        if not 0 < self._held <= length or length - left_out > self.rows + ROOM:
            self._move(length)
        elif self._held < length:
            self._session.borrow(self._target, slice(self._held, length), self._held - left_out)
        else:
            self._session.lengths[:] = length - left_out
        self._held = length

    def _move(self, length: int) -> None:
        """Copies sinks and window anew."""
        sinks = min(self._sinks, length)
        first = max(sinks, length - self._window)
        self._session.borrow(self._target, slice(0, sinks), 0)
        self._session.borrow(self._target, slice(first, length), sinks)
        self._session.left_out = first - sinks

    def step(self, token: int) -> Logits:
        """What follows a token, float32 [vocab], after the rows that were copied and the tokens since."""
        logits: Logits = self._session.step([token])[-1]
        return logits


def confidence(logits: Logits) -> float:
    """The probability of the most likely token, at temperature 1."""
    return float(1 / np.exp(logits - logits.max()).sum())
