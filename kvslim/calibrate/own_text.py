"""Text that a model writes itself, so that none need be given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvslim.memory import usable_memory
from kvslim.progress import Progress
from kvslim.runtime.opening import Logits
from kvslim.runtime.session import DecodeSession

Array = np.ndarray
SELF_BATCH = 32  # windows that a model writes side by side; more take longer each
CACHE_SHARE = 4  # their cache may take one part in so many of the memory that is left


class OwnText(NamedTuple):
    """Windows that a model shall write.

    Attributes:
        samples: Windows.
        length: Tokens per window, the first one included.
        seed: Seed of the samples. A window does not depend on how many others are written.
    """

    samples: int
    length: int
    seed: int


def self_windows(graph: Path, start: int, texts: Sequence[OwnText], progress: Progress) -> list[Array]:
    """Texts that the model writes itself: sampled from its own distribution, so no text need be given.

    All windows of all texts are written side by side, as many at once as their cache and memory allow: each step reads
    the weights once, which takes most of its time.

    Args:
        graph: Folder of an export, mostly the model's plain one: onnxruntime decodes several times faster than torch.
        start: The token that starts every window.
        texts: What is wanted.
        progress: Receives the progress.

    Returns:
        For each text [samples, length] token ids.
    """
    longest = max(text.length for text in texts)
    points = np.concatenate([_points(text, longest) for text in texts])
    session = DecodeSession(graph, capacity=longest)
    fitting = usable_memory() // (CACHE_SHARE * session.layout.bytes_at(longest))
    most = 1 if session.layout.needs_own_runtime else min(SELF_BATCH, max(fitting, 1))
    rounds = -(-len(points) // most)
    rows = -(-len(points) // rounds)
    session.allocate(rows)
    points = np.resize(points, (rounds, rows, longest))
    tokens = np.full(points.shape, start)
    steps = [(part, place) for part in range(rounds) for place in range(1, longest)]
    for part, place in progress.track(steps, "the model's own text"):
        if place == 1:
            session.reset()
        logits = session.step(tokens[part, :, place - 1 : place])[:, -1]
        tokens[part, :, place] = _drawn(logits, points[part, :, place])
    ends = np.cumsum([text.samples for text in texts])
    *windows, _ = np.split(tokens.reshape(-1, longest), ends)  # the last round may have more rows than are wanted
    return [found[:, : text.length] for found, text in zip(windows, texts, strict=True)]


def _points(text: OwnText, width: int) -> Array:
    """[samples, width] where each token lies in its cumulative distribution, from 0 to 1; 0 behind the text's end."""
    drawn = np.random.default_rng(text.seed).random((text.samples, text.length))
    return np.pad(drawn, ((0, 0), (0, width - text.length)))


def _drawn(logits: Logits, points: Array) -> Array:
    """One token [n] from each of the distributions whose logits are [n, vocab], by points [n] between 0 and 1.

    They are drawn one by one: a row fits a processor's cache, and takes half the time there.
    """
    found = []
    for row, point in zip(logits, points, strict=True):
        ends = np.exp(row - row.max()).cumsum(dtype=np.float64)
        found.append(np.searchsorted(ends, point * ends[-1], side="right"))
    return np.minimum(found, logits.shape[1] - 1)


def start_token(config: Any) -> int:
    """The token that starts a text of a model with this config."""
    for token in (config.bos_token_id, config.eos_token_id):
        token = token[0] if isinstance(token, list) else token
        if token is not None:
            return int(token)
    return 0
