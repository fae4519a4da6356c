"""Whole characters from tokens that come one by one: a character may be spread over several tokens."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

_CONTEXT_TOKENS = 6  # more than enough to tell whether a token starts with a space
_PART_TOKENS = 3  # part of a character has at most three bytes in UTF-8, and a token at least one
_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


class CharacterStream:
    """The text that new tokens add to a prompt.

    Tokens become bytes, and bytes become text as soon as they are whole characters. `Tokenizer.decode` alone does not
    do that: it gives U+FFFD for part of a character and, with byte fallback, for the whole characters around it too.

    Args:
        tokenizer: Tells the text of tokens.
        prompt_ids: The tokens before the first one; they may end inside a character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._decoders = _types(json.loads(tokenizer.decoder.__getstate__())) if tokenizer.decoder else set()
        self._added = tokenizer.get_added_tokens_decoder()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._context = list(prompt_ids[-_CONTEXT_TOKENS - _PART_TOKENS : -_PART_TOKENS])
        for token in prompt_ids[-_PART_TOKENS:]:
            self.push(token)

    def push(self, token: int) -> str:
        """The characters that are whole with this token; bytes that belong to none become U+FFFD."""
        found = self._bytes(token)
        added = self._text(token).encode() if found is None else found
        if added:
            self._context = [*self._context[1 - _CONTEXT_TOKENS :], token]
        return self._utf8.decode(added)

    def _bytes(self, token: int) -> bytes | None:
        """The bytes that a token stands for, none for one without text; None for one that is made of characters."""
        name, added = self._tokenizer.id_to_token(token), self._added.get(token)
        if name is None or (added is not None and added.special):
            return b""
        if "ByteFallback" in self._decoders and (byte := _FALLBACK.fullmatch(name)):
            return bytes.fromhex(byte[1])
        is_spelled = "ByteLevel" in self._decoders and added is None and _BYTES.keys() >= set(name)
        return bytes(map(_BYTES.__getitem__, name)) if is_spelled else None

    def _text(self, token: int) -> str:
        """What a token adds behind others: decoders drop a space before the first token that they are given."""
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode([*self._context, token])[len(before) :]


def _types(decoder: dict[str, Any]) -> set[str]:
    """The type of a decoder, and those of the decoders that it is made of."""
    return {decoder["type"]}.union(*map(_types, decoder.get("decoders", ())))


def _byte_letters() -> dict[str, int]:
    """The letters that byte-level tokens are spelled with, as in GPT-2: each byte has one that can be printed."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(0x100)).difference(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_letters()
