"""Messages of a conversation, as chat interfaces send them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvslim.errors import UsageError

TEXT_PARTS = ("text", "input_text", "output_text")
Messages = Sequence[Mapping[str, Any]]


def read_messages(found: object, where: str) -> list[dict[str, Any]]:
    """The messages that stand in JSON.

    Args:
        found: What stands there.
        where: The place, for errors.

    Raises:
        UsageError: It is no list of objects with a role each, or an empty one.
    """
    messages = found if isinstance(found, list) else []
    if not messages or not all(isinstance(each, dict) and isinstance(each.get("role"), str) for each in messages):
        fix = 'write each message as {"role": "user", "content": "..."}'
        raise UsageError("messages is not a list of role and content", where=where, fix=fix)
    return messages


def flattened(messages: Messages) -> list[dict[str, Any]]:
    """The messages with one text for each content.

    Args:
        messages: Each with `role` and `content`: a text, or a list of parts, whose texts become lines of one. Only a
            message that calls tools may do without.

    Raises:
        UsageError: A content is no text.
    """
    return [_flattened(message, index) for index, message in enumerate(messages)]


def _flattened(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A message whose content is one text; only one that calls tools may do without."""
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = "\n".join(
            _text_of(part, f"messages[{index}].content[{number}]") for number, part in enumerate(content)
        )
    elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        fix = 'write {"role": "user", "content": "..."}'
        raise UsageError("the content is not a text", where=f"messages[{index}]", fix=fix)
    return {**message, "content": content}


def _text_of(part: object, where: str) -> str:
    """The text of one part of a content, as clients of chat interfaces send it."""
    text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") in TEXT_PARTS else part
    if not isinstance(text, str):
        kind = part.get("type", "nothing") if isinstance(part, Mapping) else type(part).__name__
        fix = 'give text alone: {"type": "text", "text": "..."}'
        raise UsageError(f"a part of the content is {kind!r}, not text", where=where, fix=fix)
    return text
