"""The text that a model heals on, in parts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Text(NamedTuple):
    """Windows of text, and which of their tokens count.

    Attributes:
        windows: [n, length] token ids.
        loss_mask: [n, length] bool, the tokens whose prediction counts; None for all.
    """

    windows: np.ndarray
    loss_mask: np.ndarray | None

    def part(self, start: int, stop: int | None = None) -> Text:
        """Some of the windows."""
        return Text(self.windows[start:stop], None if self.loss_mask is None else self.loss_mask[start:stop])


class Texts(NamedTuple):
    """Text to train on, to watch the training by, and to judge it by in the end."""

    trained: Text
    watched: Text
    judged: Text
