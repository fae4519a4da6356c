"""Windows of tokens from text, and which of their tokens count when a model is judged."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvslim.calibrate.text_source import source_pieces
from kvslim.errors import UsageError
from kvslim.token_ids import check_ids, knows_more, start_of_text

Array = np.ndarray
LEAST_WINDOW = 32  # tokens, the shortest length that a recipe allows for both
WHOLE = (0.0, 1.0)
CALIBRATION_SHARE, VALIDATION_SHARE = (0.0, 0.8), (0.8, 1.0)  # of one text that serves both


def check_tokens(source: str, tokenizer: Any, vocab_size: int) -> None:
    """Refuses a text with tokens beyond the model's embedding table.

    Args:
        source: As for `text_windows`.
        tokenizer: Its tokenizer.
        vocab_size: Tokens that the model has embeddings for.

    Raises:
        UsageError: Naming the first such token.
    """
    if source != "self" and knows_more(tokenizer, vocab_size):
        tokens, _ = _tokenised(source, tokenizer)
        check_ids([*start_of_text(tokenizer), *tokens], vocab_size, tokenizer.convert_ids_to_tokens, source)


def text_windows(
    source: str,
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    share: tuple[float, float] = WHOLE,
    key: str = "calibration.length",
) -> Array:
    """Windows of a file, a hub data set or, for `self`, the demo's held-out stories.

    Args:
        source: A .txt or .jsonl file, `hub:DATASET[:SPLIT]`, or `self` for the demo model.
        tokenizer: Its tokenizer.
        samples: Windows wanted.
        length: Tokens per window.
        share: Part of the text to use, so that calibration and validation can share a file without overlap.
        key: What sets the length, for the error.

    Returns:
        [n, length] token ids, 1 <= n <= samples, evenly spread over the text; each window starts as the tokenizer
        starts a text.

    Raises:
        UsageError: The text has fewer tokens than one window.
    """
    if source == "self":
        from kvslim.demo.world import heldout_text

        texts = heldout_text(samples, words=length)
        return np.stack([np.asarray(tokenizer(text).input_ids[:length]) for text in texts])
    tokens, _ = _tokenised(source, tokenizer)
    first, last = (int(len(tokens) * edge) for edge in share)
    prefix, found = start_of_text(tokenizer), tokens[first:last]
    most = len(prefix) + len(found)
    if most < length:
        shorter = f", or shorter windows (--set {key}={most})" if most >= LEAST_WINDOW else ""
        message = f"the text has {most} tokens, less than one window of {length}"
        raise UsageError(message, where=source, fix=f"give more text{shorter}")
    return _spread(found, prefix, samples, length)


def text_beginning(source: str, tokenizer: Any, length: int, share: tuple[float, float] = WHOLE) -> Array:
    """[n] token ids of one text: the first `length` tokens of a source, or all that there are.

    Args:
        source: As for `text_windows`.
        tokenizer: Its tokenizer.
        length: Tokens at most, those with which the tokenizer starts a text included.
        share: Part of the text to use.
    """
    if source == "self":
        return text_windows(source, tokenizer, samples=1, length=length)[0]
    tokens, _ = _tokenised(source, tokenizer)
    first, last = (int(len(tokens) * edge) for edge in share)
    return np.concatenate([start_of_text(tokenizer), tokens[first:last]])[:length]


def loss_mask(source: str, tokenizer: Any, *, samples: int, length: int, share: tuple[float, float] = WHOLE) -> Array:
    """Which tokens of `text_windows` count when a model is judged: of prompts and conversations, the answers alone.

    Arguments are those of `text_windows`.

    Returns:
        [n, length] bool.
    """
    _, counted = _tokenised(source, tokenizer)
    first, last = (int(len(counted) * edge) for edge in share)
    return _spread(counted[first:last], np.zeros(len(start_of_text(tokenizer)), bool), samples, length)


def _spread(tokens: Array, prefix: Array, samples: int, length: int) -> Array:
    """Up to `samples` windows of tokens, at least one long, each with the prefix in front."""
    body = length - len(prefix)
    available = len(tokens) // body
    starts = np.linspace(0, len(tokens) - body, min(samples, available)).astype(int)
    return np.stack([np.concatenate([prefix, tokens[start : start + body]]) for start in starts])


def _tokenised(source: str, tokenizer: Any) -> tuple[Array, Array]:
    """Token ids of a source, and which of them count."""
    tokens: list[int] = []
    counted: list[bool] = []
    for text, counts in source_pieces(source, tokenizer):
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        tokens += ids
        counted += [counts] * len(ids)
    return np.asarray(tokens, dtype=np.int64), np.asarray(counted, dtype=bool)
