"""The text that a model heals on, in parts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvslim.errors import UsageError

LEAST = 3  # windows
WATCHED, JUDGED = 4096, 8192  # tokens of the held-out text, at most
SHARE = 8  # of the windows, one part of so many is watched and one judged


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


def check_count(count: int) -> None:
    """Refuses text of too few windows.

    Raises:
        UsageError: With how many there are.
    """
    if count < LEAST:
        raise UsageError(
            f"to heal takes {LEAST} windows of text, and there are {count}",
            where="recipe: heal",
            fix="give a longer text with --calibration, or set calibration.samples or calibration.length",
        )


def parts_of(windows: Text) -> Texts:
    """The text in three parts: most of it to train on, two others in which nothing of that stands.

    Raises:
        UsageError: As `check_count`.
    """
    count, length = windows.windows.shape
    check_count(count)
    judged, watched = (max(1, min(count // SHARE, tokens // length)) for tokens in (JUDGED, WATCHED))
    first = count - judged - watched
    return Texts(windows.part(0, first), windows.part(first, first + watched), windows.part(first + watched, None))
