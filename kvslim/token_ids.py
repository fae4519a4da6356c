"""What a text must be to have token ids, ids that start one, and those that a model has no embedding for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvslim.errors import UsageError


def check_unicode(text: str, where: str) -> None:
    """Refuses half of a surrogate pair, which tokenizers cannot read.

    Raises:
        UsageError: There is one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"not Unicode: {error.reason}", where=where, fix="give UTF-8 text") from error


def check_ids(
    ids: Sequence[int] | npt.NDArray[np.int64], vocab_size: int, name_of: Callable[[int], str | None], where: str
) -> None:
    """Refuses ids beyond the embedding table.

    Args:
        ids: Of a text, any shape.
        vocab_size: Rows of the table.
        name_of: The tokenizer's name of a token.
        where: Where the text comes from.

    Raises:
        UsageError: Naming the first such token.
    """
    found = np.asarray(ids, dtype=np.int64).ravel()
    beyond = found[found >= vocab_size]
    if beyond.size:
        token = int(beyond[0])
        name = name_of(token)
        what = "one of them" if name is None else repr(name)
        raise UsageError(
            f"{what} is token {token}, but the model has embeddings for tokens 0 to {vocab_size - 1} only",
            where=where,
            fix="leave it out of the text, or give the tokenizer that the model was trained with",
        )


def knows_more(tokenizer: Any, vocab_size: int) -> bool:
    """Whether one of transformers' tokenizers has a token beyond the embedding table; few do."""
    return max(tokenizer.get_vocab().values(), default=0) >= vocab_size


def start_of_text(tokenizer: Any) -> npt.NDArray[np.int64]:
    """The tokens with which a tokenizer of transformers starts every text."""
    bare, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    count = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return np.asarray(whole[:count], dtype=np.int64)
