"""Conversations as a model reads them: in the frame of its chat template, with the assistant's answers told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kvslim.errors import UsageError, first_line

ASSISTANT = "assistant"


class Piece(NamedTuple):
    """A part of a text.

    Attributes:
        text: The text.
        counts: Whether a model is judged on it.
    """

    text: str
    counts: bool


class Conversation(NamedTuple):
    """Messages that belong together.

    Attributes:
        messages: Each with `role` and `content`, one text.
        where: The line that they stand on, for errors.
    """

    messages: tuple[Mapping[str, Any], ...]
    where: str


def rendered(conversation: Conversation, tokenizer: Any, start: str) -> Sequence[Piece]:
    """The text of a conversation. The assistant's answers count, or all of it where they cannot be told apart.

    That is so where there is none, and where the template writes an earlier answer otherwise than the last one, as some
    do that leave thoughts out.

    Args:
        conversation: The messages.
        tokenizer: A tokenizer of transformers.
        start: What it starts every text with, which is left out: every window has it.

    Raises:
        UsageError: The tokenizer has no chat template, or it refuses the messages.
    """
    messages, where = conversation

    def text(end: int, *, asks: bool = False) -> str:
        return _text(messages[:end], tokenizer, where, asks=asks).removeprefix(start)

    whole = text(len(messages))
    pieces, told = list[Piece](), ""
    for place, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        asked = text(place, asks=True) if place else ""
        answered = text(place + 1)
        if not (asked.startswith(told) and answered.startswith(asked) and whole.startswith(answered)):
            return [Piece(whole, True)]
        pieces += [Piece(asked[len(told) :], False), Piece(answered[len(asked) :], True)]
        told = answered
    return [*pieces, Piece(whole[len(told) :], not pieces)]


def _text(messages: Sequence[Mapping[str, Any]], tokenizer: Any, where: str, *, asks: bool) -> str:
    """What the template makes of messages, up to where the assistant answers if it is asked to."""
    if not tokenizer.chat_template:
        fix = 'give {"text": ...} or {"prompt": ..., "completion": ...} instead'
        raise UsageError("the tokenizer has no chat template for these messages", where=where, fix=fix)
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asks))
    except Exception as error:  # a template is code that came with the model, and fails in as many ways
        message = f"the chat template refuses these messages: {first_line(error)}"
        raise UsageError(message, where=where, fix="give the roles that the model was made for") from error
