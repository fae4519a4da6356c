"""Sentences for encoders, from a text of the user's or, with none given, from the demo's stories."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvslim.calibrate.corpus import WHOLE
from kvslim.calibrate.text_source import source_text
from kvslim.errors import UsageError

Texts = Sequence[Sequence[int]]

# The end of a sentence, in Chinese and Japanese too, or of a line: headings and list items have no full stop.
_ENDS = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])|\n+")
_LETTERS = 4  # of a sentence at least, in a script that puts no spaces between words
_THAI = "\u0e00"  # the first letter of the first such script
_STORY_WORDS = 200
_GROUPS = (1, 2, 4, 8)  # sentences of a story that are taken as one text, in turn, so that lengths differ
MASKED_SHARE = 0.15  # as in BERT's training


class Sentences(NamedTuple):
    """Tokenised sentences.

    Attributes:
        texts: Token ids of each.
        masked: The same with a share of the tokens masked; empty without a masked-token head.
        targets: Which tokens of each were masked.
    """

    texts: Texts
    masked: Texts
    targets: Sequence[npt.NDArray[np.bool_]]


def sentences(source: str, *, samples: int, share: tuple[float, float] = WHOLE, held_out: bool = True) -> list[str]:
    """Distinct sentences, spread evenly over a source.

    Args:
        source: A .txt or .jsonl file, `hub:DATASET[:SPLIT]`, or `self` for the demo's stories, as an encoder writes no
            text of its own.
        samples: Sentences wanted.
        share: Part of the sentences to use, so that calibration and validation can share a file without overlap.
        held_out: Whether the demo's stories are the held-out ones or those of its training.

    Returns:
        At most `samples` texts, at least two.

    Raises:
        KvslimError: The source cannot be read, or holds fewer than two sentences.
    """
    found = _of_stories(samples, held_out) if source == "self" else _split(source_text(source))
    first, last = (int(len(found) * edge) for edge in share)
    found = found[first:last]
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


def mask_tokens(texts: Texts, mask_id: int, special: set[int], seed: int) -> Sentences:
    """Masks a share of the tokens of each text, one at least, that are not special.

    Args:
        texts: Token ids.
        mask_id: The id that stands for a masked token.
        special: Ids that are never masked.
        seed: Of the choice.
    """
    generator = np.random.default_rng(seed)
    masked, targets = [], []
    for text in texts:
        ids = np.asarray(text)
        free = np.flatnonzero(~np.isin(ids, list(special)))
        count = min(len(free), max(1, round(MASKED_SHARE * len(free))))
        target = np.zeros(len(ids), dtype=bool)
        target[generator.choice(free, size=count, replace=False)] = True
        masked.append(np.where(target, mask_id, ids).tolist())
        targets.append(target)
    return Sentences(texts, masked, targets)


def _split(text: str) -> list[str]:
    pieces = (piece.strip() for piece in _ENDS.split(text))
    return list(dict.fromkeys(piece for piece in pieces if " " in piece or _is_unspaced(piece)))


def _is_unspaced(piece: str) -> bool:
    """Whether a piece without a space may be a sentence all the same, as in Chinese, Japanese and Thai."""
    return len(piece) >= _LETTERS and any(letter >= _THAI and letter.isalpha() for letter in piece)


def _of_stories(samples: int, held_out: bool) -> list[str]:
    from kvslim.demo.world import calibration_text, heldout_text

    texts: list[str] = []
    stories = heldout_text if held_out else calibration_text
    for story in stories(max(2, samples // 8), _STORY_WORDS):
        parts = _split(story)
        while parts:
            count = _GROUPS[len(texts) % len(_GROUPS)]
            texts.append(" ".join(parts[:count]))
            parts = parts[count:]
    return list(dict.fromkeys(texts))
