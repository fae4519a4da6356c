"""The JSON of answers, whole and in the chunks of a stream, as OpenAI's API gives them."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from kvslim.runtime.completion import Usage


class Form(ABC):
    """The form of the answer to one request.

    Args:
        model: The name of the model.
        fingerprint: Changes when the artifact does.
    """

    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, model: str, fingerprint: str) -> None:
        identity, created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())
        self._head = {"id": identity, "created": created, "model": model, "system_fingerprint": fingerprint}

    def whole(self, texts: Sequence[str], usages: Sequence[Usage]) -> dict[str, Any]:
        """The answer in one object."""
        pairs = enumerate(zip(texts, usages, strict=True))
        choices = [
            _choice(place, self._text(text), finish_reason=usage.finish_reason) for place, (text, usage) in pairs
        ]
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": usage_of(usages)}

    def chunk(self, place: int, piece: str) -> dict[str, Any]:
        """A piece of a text."""
        return self._chunk([_choice(place, self._piece(piece))])

    def end(self, place: int, usage: Usage) -> dict[str, Any]:
        """The end of a text."""
        return self._chunk([_choice(place, self._nothing(), finish_reason=usage.finish_reason)])

    def usage_chunk(self, usages: Sequence[Usage]) -> dict[str, Any]:
        """The chunk behind all others, with what they took, for clients that ask for it."""
        return {**self._chunk([]), "usage": usage_of(usages)}

    @abstractmethod
    def begin(self) -> list[dict[str, Any]]:
        """The chunks before the first piece."""

    @abstractmethod
    def _text(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _piece(self, piece: str) -> dict[str, Any]: ...

    @abstractmethod
    def _nothing(self) -> dict[str, Any]: ...

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_object, "choices": choices}


class ChatForm(Form):
    """The answer to a conversation."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def begin(self) -> list[dict[str, Any]]:
        """One chunk that names the role."""
        return [self._chunk([_choice(0, {"delta": {"role": "assistant", "content": ""}})])]

    def _text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _piece(self, piece: str) -> dict[str, Any]:
        return {"delta": {"content": piece}}

    def _nothing(self) -> dict[str, Any]:
        return {"delta": {}}


class CompletionForm(Form):
    """The continuations of prompts."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def begin(self) -> list[dict[str, Any]]:
        """Nothing."""
        return []

    def _text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _piece(self, piece: str) -> dict[str, Any]:
        return {"text": piece}

    def _nothing(self) -> dict[str, Any]:
        return {"text": ""}


def usage_of(usages: Sequence[Usage]) -> dict[str, Any]:
    """Counts of all texts of an answer together."""
    prompt, new = sum(usage.prompt_tokens for usage in usages), sum(usage.new_tokens for usage in usages)
    cached = sum(usage.cached_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {
            "accepted_prediction_tokens": sum(usage.accepted_tokens for usage in usages),
            "rejected_prediction_tokens": sum(usage.proposed_tokens - usage.accepted_tokens for usage in usages),
        },
    }


def _choice(place: int, text: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": place, **text, "logprobs": None, "finish_reason": finish_reason}
