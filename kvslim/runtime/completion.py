"""Texts from an exported folder: prompts to token ids, and completions streamed from a cache that is kept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field
from tokenizers import Tokenizer

from kvslim.contract import Frozen
from kvslim.errors import UsageError
from kvslim.runtime.generate import GREEDY, Sampling, eos_ids, generate_tokens, load_tokenizer, stream_text
from kvslim.runtime.session import DecodeSession
from kvslim.runtime.template import ChatTemplate, Messages


class Usage(Frozen):
    """What one completion took."""

    prompt_tokens: int
    cached_tokens: int = Field(description="tokens of the prompt that the cache held already")
    new_tokens: int = Field(description="without the token that ended the text")
    finish_reason: Literal["stop", "length"] = Field(description="stop: the model ended its text")
    ttft_ms: float = Field(description="time to the first token, milliseconds")
    tokens_per_second: float | None = Field(description="of the tokens after the first; None where there is none")
    context_tokens: int = Field(description="prompt and new tokens")
    context_capacity: int = Field(description="tokens that the cache has room for")
    kv_mib: float = Field(description="MiB of the cache at its capacity")


class PromptEncoder:
    """Prompts and conversations to token ids.

    Args:
        folder: Folder with the tokenizer's files.

    Raises:
        NotFoundError: There is no tokenizer.json.
        ArtifactError: It cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.tokenizer: Tokenizer = load_tokenizer(folder)

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template; reading it raises what `ChatTemplate` does."""
        return ChatTemplate(self._folder)

    def prompt(self, text: str) -> list[int]:
        """The ids of a text, with the special tokens that the tokenizer puts around one.

        Raises:
            UsageError: The text has no tokens, or is not Unicode.
        """
        return self._encode(text, special=True)

    def chat(self, messages: Messages) -> list[int]:
        """The ids of a conversation; its special tokens are those of the template.

        Raises:
            UsageError: There is no template, it refuses the messages, or they are not Unicode.
        """
        return self._encode(self.template.render(messages), special=False)

    def _encode(self, text: str, special: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"not Unicode: {error.reason}", where="prompt", fix="give UTF-8 text") from error
        ids = self.tokenizer.encode(text, add_special_tokens=special).ids
        if not ids:
            raise UsageError("the prompt has no tokens", where="prompt", fix="give some text to continue")
        return ids


class Completer:
    """Completes prompts one after another, and keeps of the cache what the next prompt begins with.

    Attributes:
        usage: What the last completion took, once all of its text was taken.

    Args:
        folder: Folder with model.onnx and generation_config.json.
        tokenizer: The folder's tokenizer.
        capacity: Tokens to allocate the cache for.
        threads: Threads of one operator; None leaves the choice to onnxruntime.

    Raises:
        UsageError: The capacity is not positive.
        NotFoundError: A file of the folder is missing.
        ArtifactError: A file of the folder is broken.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        *,
        capacity: int,
        threads: int | None = None,
    ) -> None:
        self._stop = eos_ids(folder)
        self._session = DecodeSession(folder, capacity=capacity, threads=threads)
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self.usage: Usage | None = None

    def reset(self) -> None:
        """Empties the cache."""
        self._session.reset()

    def stream(self, ids: Sequence[int], max_new_tokens: int, sampling: Sampling = GREEDY) -> Iterator[str]:
        """The text that follows a prompt, in pieces, without the token that ends it.

        Args:
            ids: Tokens of the whole prompt, those of earlier turns included.
            max_new_tokens: Tokens to generate at most; a full cache ends the text too.
            sampling: How tokens are drawn.

        Raises:
            UsageError: The cache has no room for the prompt and one more token.
            ArtifactError: onnxruntime fails on the graph.
        """
        capacity = self._session.capacity
        if len(ids) >= capacity:
            raise UsageError(
                f"{len(ids)} tokens leave no room in a cache of {capacity}",
                where="prompt",
                fix="shorten it, or give more --context where the model has more positions",
            )
        cached = self._session.keep_shared(self._tokens, ids[:-1])  # the logits of the last token are wanted
        self._tokens = list(ids)
        return stream_text(
            self._tokenizer, ids, self._timed(cached, min(max_new_tokens, capacity - len(ids)), sampling)
        )

    def _timed(self, cached: int, most: int, sampling: Sampling) -> Iterator[int]:
        """New tokens; notes them, and at the end what they took."""
        prompt, start = len(self._tokens), time.perf_counter()
        new = generate_tokens(
            self._session, self._tokens[cached:], max_new_tokens=most, stop=self._stop, sampling=sampling
        )
        times = []
        for token in new:
            times.append(time.perf_counter() - start)
            self._tokens.append(token)
            yield token
        times = times or [time.perf_counter() - start]
        self.usage = Usage(
            prompt_tokens=prompt,
            cached_tokens=cached,
            new_tokens=len(self._tokens) - prompt,
            finish_reason="length" if len(self._tokens) - prompt == most else "stop",
            ttft_ms=times[0] * 1000,
            tokens_per_second=(len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None,
            context_tokens=len(self._tokens),
            context_capacity=self._session.capacity,
            kv_mib=self._session.layout.bytes_at(self._session.capacity) / 2**20,
        )
