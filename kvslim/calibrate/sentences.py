"""Held-out sentences for encoders, from a text of the user's or, with none given, from the demo's stories."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from kvslim.calibrate.corpus import source_text
from kvslim.errors import UsageError

# The end of a sentence, or of a line: headings and list items have no full stop.
_ENDS = re.compile(r"(?<=[.!?])\s+|\n+")
_STORY_WORDS = 200
_GROUPS = (1, 2, 4, 8)  # sentences of a story that are taken as one text, in turn, so that lengths differ


def sentences(source: str, *, samples: int) -> list[str]:
    """Distinct sentences, spread evenly over a source.

    Args:
        source: A .txt or .jsonl file, `hub:DATASET[:SPLIT]`, or `self` for the demo's held-out stories, as an encoder
            writes no text of its own.
        samples: Sentences wanted.

    Returns:
        At most `samples` texts, at least two.

    Raises:
        KvslimError: The source cannot be read, or holds fewer than two sentences.
    """
    found = _of_stories(samples) if source == "self" else _split(source_text(source))
    if len(found) < 2:
        raise UsageError(
            f"the text has {len(found)} sentences", where=source, fix="give a text of some hundred sentences"
        )
    places = np.linspace(0, len(found) - 1, min(samples, len(found))).astype(int)
    return [found[place] for place in places]


def tokenised(texts: list[str], tokenizer: Any, length: int) -> list[list[int]]:
    """The token ids of each text with the tokenizer's own frame, cut to `length` tokens."""
    encoded = tokenizer(texts, truncation=True, max_length=length)
    return [list(ids) for ids in encoded.input_ids]


def _split(text: str) -> list[str]:
    pieces = (piece.strip() for piece in _ENDS.split(text))
    return list(dict.fromkeys(piece for piece in pieces if " " in piece))


def _of_stories(samples: int) -> list[str]:
    from kvslim.demo.world import heldout_text

    texts: list[str] = []
    for story in heldout_text(max(2, samples // 8), _STORY_WORDS):
        parts = _split(story)
        while parts:
            count = _GROUPS[len(texts) % len(_GROUPS)]
            texts.append(" ".join(parts[:count]))
            parts = parts[count:]
    return list(dict.fromkeys(texts))
