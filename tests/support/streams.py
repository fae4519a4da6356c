"""The text of many tokens, as a stream gives it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer

from kvslim.runtime.characters import CharacterStream


def stream_text(tokenizer: Tokenizer, prompt_ids: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text that tokens add to a prompt, in pieces of whole characters; part of one at the end is left out.

    Args:
        tokenizer: Tells the text of tokens.
        prompt_ids: The tokens before the first of `tokens`.
        tokens: New token ids.
    """
    return filter(None, map(CharacterStream(tokenizer, prompt_ids).push, tokens))
