"""Texts from an exported folder: prompts to token ids, and completions, streamed from a kept cache or side by side."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field
from tokenizers import Tokenizer

from kvslim.contract import Frozen
from kvslim.errors import UsageError
from kvslim.export.manifest import SPECULATIVE_GRAPH
from kvslim.runtime.generate import GREEDY, Sampling, eos_ids, load_tokenizer
from kvslim.runtime.opening import Logits
from kvslim.runtime.session import DecodeSession
from kvslim.runtime.writing import Completion, FinishReason, write
from kvslim.speculative.loop import acceptance, tokens_per_round, write_speculatively
from kvslim.speculative.speculator import Speculator
from kvslim.token_ids import check_ids, check_unicode
from kvslim.types import Draft

if TYPE_CHECKING:
    from kvslim.messages import Messages
    from kvslim.runtime.template import ChatTemplate


class Usage(Frozen):
    """What one completion took."""

    prompt_tokens: int
    cached_tokens: int = Field(description="tokens of the prompt that the cache held already")
    new_tokens: int = Field(description="without the token that ended the text")
    finish_reason: FinishReason = Field(
        description="stop: the model or a stop string ended the text; interrupted: its reader did"
    )
    ttft_ms: float = Field(description="time to the first token, milliseconds")
    tokens_per_second: float | None = Field(description="of the tokens after the first; None where there is none")
    proposed_tokens: int = Field(description="that a draft proposed")
    accepted_tokens: int = Field(description="of those the ones that were right")
    tokens_per_round: float | None = Field(description="of a run of the graph; None where nothing could be proposed")
    acceptance: tuple[float, ...] = Field(description="how often the first proposal of a run was right, the second ...")
    context_tokens: int = Field(description="prompt and new tokens")
    context_capacity: int = Field(description="tokens that the cache has room for")
    kv_mib: float = Field(description="MiB of the cache at its capacity")


class PromptEncoder:
    """Prompts and conversations to token ids.

    Args:
        folder: Folder with the tokenizer's files.
        vocab_size: Tokens that the model has embeddings for.

    Raises:
        NotFoundError: There is no tokenizer.json.
        ArtifactError: It cannot be read.
    """

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._folder, self._vocab_size = folder, vocab_size
        self.tokenizer: Tokenizer = load_tokenizer(folder)

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template; reading it raises what `ChatTemplate` does."""
        from kvslim.runtime.template import ChatTemplate

        return ChatTemplate(self._folder)

    def prompt(self, text: str) -> list[int]:
        """The ids of a text, with the special tokens that the tokenizer puts around one.

        Raises:
            UsageError: The text has no tokens, is not Unicode, or has a token that the model does not know.
        """
        return self._encode(text, special=True)

    def chat(self, messages: Messages) -> list[int]:
        """The ids of a conversation; its special tokens are those of the template.

        Raises:
            UsageError: As `prompt`, or there is no template, or it refuses the messages.
        """
        return self._encode(self.template.render(messages), special=False)

    def _encode(self, text: str, special: bool) -> list[int]:
        check_unicode(text, where="prompt")
        ids = self.tokenizer.encode(text, add_special_tokens=special).ids
        if not ids:
            raise UsageError("the prompt has no tokens", where="prompt", fix="give some text to continue")
        check_ids(ids, self._vocab_size, self.tokenizer.id_to_token, where="prompt")
        return ids


class Completer:
    """Completes prompts one after another, and keeps of the cache what the next prompt begins with; or several at once.

    Attributes:
        usage: What the last completion took, once all of its text was taken or its reader has closed it.

    Args:
        folder: Folder with model.onnx and generation_config.json.
        tokenizer: The folder's tokenizer.
        capacity: Tokens to allocate the cache for.
        batch: Prompts to allocate it for, which `complete` then takes without allocating it anew.
        threads: Threads of one operator; None leaves the choice to onnxruntime.
        draft: What proposes tokens to a single text, where the artifact has a graph for it; None for nothing.

    Raises:
        UsageError: The capacity is not positive, or the cache holds fewer sequences than `batch`.
        NotFoundError: A file of the folder is missing.
        ArtifactError: A file of the folder is broken.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        *,
        capacity: int,
        batch: int = 1,
        threads: int | None = None,
        draft: Draft | None = None,
    ) -> None:
        self._ends = eos_ids(folder)
        graph = folder if draft is None else folder / SPECULATIVE_GRAPH
        self._session = DecodeSession(graph, capacity=capacity, batch=batch, threads=threads)
        self._speculator = None if draft is None else Speculator(self._session, draft)
        self._tokenizer = tokenizer
        self._last: Completion | None = None
        self.usage: Usage | None = None

    def check(self, ids: Sequence[int]) -> None:
        """Refuses a prompt that is too long.

        Raises:
            UsageError: The cache has no room for the prompt and one more token.
        """
        if len(ids) >= self._session.capacity:
            raise UsageError(
                f"{len(ids)} tokens leave no room in a cache of {self._session.capacity}",
                where="prompt",
                fix="shorten it, or give more --context where the model has more positions",
            )

    def stream(
        self, ids: Sequence[int], max_new_tokens: int, sampling: Sampling = GREEDY, stops: Sequence[str] = ()
    ) -> Generator[str, None, None]:
        """The text that follows a prompt, in pieces of whole characters, without what ends it.

        There is a piece, maybe an empty one, after every run of the graph: a caller can close the iterator between any
        two, and what has been run stays in the cache.

        Args:
            ids: Tokens of the whole prompt, those of earlier turns included.
            max_new_tokens: Tokens to generate at most; a full cache ends the text too.
            sampling: How tokens are drawn.
            stops: Strings that end the text.

        Raises:
            UsageError: The cache has no room for the prompt and one more token, or a stop string is empty.
            ArtifactError: onnxruntime fails on the graph.
        """
        completion, before = self._completion(ids, max_new_tokens, sampling, stops), self._last
        if self._session.batch > 1:
            self._session.allocate(1)
        held = [*before.ids, *before.tokens] if before else ()
        cached = self._session.keep_shared(held, ids[:-1])  # the logits of the last token are wanted
        self._last, self.usage = completion, None
        return self._streamed(completion, cached)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stops: Sequence[str] = (),
    ) -> list[tuple[str, Usage]]:
        """What follows each of several prompts of any lengths, written side by side in an empty cache.

        Args:
            prompts: Tokens of each prompt.
            max_new_tokens: Tokens to generate for each at most; a full cache ends a text too.
            sampling: How tokens are drawn, for each as for a single prompt.
            stops: Strings that end a text.

        Returns:
            The text of each, and what it took.

        Raises:
            UsageError: As `stream`, or the cache can hold only one sequence.
            ArtifactError: onnxruntime fails on the graph.
        """
        if not prompts:
            return []
        completions = [self._completion(ids, max_new_tokens, sampling, stops) for ids in prompts]
        self._last, start = None, time.perf_counter()
        if len(completions) > self._session.batch:
            self._session.allocate(len(completions))
        logits, texts = self._session.prefill_each(prompts), [""] * len(completions)
        if self._session.batch == 1:
            texts = ["".join(self._written(completions[0], logits[0]))]
        else:
            for place, piece in write(self._session, completions, logits):
                texts[place] += piece
        return [(text, self._used(completion, 0, start)) for text, completion in zip(texts, completions, strict=True)]

    def _completion(self, ids: Sequence[int], most: int, sampling: Sampling, stops: Sequence[str]) -> Completion:
        self.check(ids)
        most = min(most, self._session.capacity - len(ids))
        return Completion(self._tokenizer, ids, most, ends=self._ends, stops=stops, sampling=sampling)

    def _streamed(self, completion: Completion, cached: int) -> Generator[str, None, None]:
        """The text of a completion of which the cache holds so many tokens; notes at the end what it took."""
        start = time.perf_counter()
        self._require(completion)
        try:
            for logits in self._session.prefill_steps(completion.ids[cached:]):  # noqa: B007 (the last are written from)
                yield ""
                self._require(completion)
            for piece in self._written(completion, logits):
                yield piece
                self._require(completion)
        except GeneratorExit:
            completion.finish_reason = completion.finish_reason or "interrupted"
        except BaseException:
            if self._last is completion:
                self._session.reset()  # a run may have ended halfway
            raise
        if self._last is completion:
            self.usage = self._used(completion, cached, start)

    def _require(self, completion: Completion) -> None:
        """Refuses to go on with a text after another one has begun, whose tokens the cache holds now."""
        if self._last is not completion:
            raise UsageError(
                "another text has begun since, and there is one cache",
                where="generate",
                fix="read a text to its end before the next, or load the artifact twice",
            )

    def _written(self, completion: Completion, logits: Logits) -> Iterator[str]:
        if self._speculator is not None:
            yield from write_speculatively(self._session, completion, logits, self._speculator)
            return
        for _, piece in write(self._session, [completion], logits[None]):
            yield piece

    def _used(self, completion: Completion, cached: int, start: float) -> Usage:
        """What a completion took that was written to its end."""
        assert completion.finish_reason is not None
        drawn = completion.times[: len(completion.tokens)]
        first = next(iter(completion.times), time.perf_counter())
        return Usage(
            prompt_tokens=len(completion.ids),
            cached_tokens=cached,
            new_tokens=len(completion.tokens),
            finish_reason=completion.finish_reason,
            ttft_ms=(first - start) * 1000,
            tokens_per_second=(len(drawn) - 1) / (drawn[-1] - drawn[0]) if len(drawn) > 1 else None,
            proposed_tokens=sum(proposed for proposed, _ in completion.rounds),
            accepted_tokens=sum(taken for _, taken in completion.rounds),
            tokens_per_round=tokens_per_round(completion.rounds),
            acceptance=acceptance(completion.rounds),
            context_tokens=len(completion.ids) + len(completion.tokens),
            context_capacity=self._session.capacity,
            kv_mib=self._session.layout.bytes_at(self._session.capacity) / 2**20,
        )
