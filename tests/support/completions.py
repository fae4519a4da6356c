"""Tokens that a session writes, without their text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvslim.runtime.session import DecodeSession
from kvslim.runtime.writing import Completion, write
from support.tiny_tokenizer import byte_tokenizer


def tokens_after(session: DecodeSession, prompt: Sequence[int], most: int, **options: Any) -> list[int]:
    """At most so many tokens after a prompt; options are those of a completion."""
    completion = Completion(byte_tokenizer(), prompt, most, **options)
    list(write(session, [completion], session.prefill(prompt)[None]))
    return completion.tokens
