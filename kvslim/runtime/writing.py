"""Texts that are being written: each draws its tokens, and several share the runs of one session."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from typing import Literal

from tokenizers import Tokenizer

from kvslim.runtime.characters import CharacterStream
from kvslim.runtime.generate import GREEDY, Sampler, Sampling
from kvslim.runtime.opening import Logits
from kvslim.runtime.session import DecodeSession
from kvslim.runtime.stops import StopStrings

FinishReason = Literal["stop", "length", "interrupted"]


class Completion:
    """One text that follows a prompt.

    Attributes:
        ids: Tokens of the prompt.
        tokens: Tokens drawn so far, without an end token.
        rounds: Of each run of the graph after the prompt's: proposals, and how many of them were right.
        times: When each draw was made, an end token's included; seconds of `time.perf_counter`.
        finish_reason: What ended the text; None while it goes on.

    Args:
        tokenizer: Tells the text of tokens.
        ids: Tokens of the prompt.
        most: Tokens to draw at most.
        ends: Tokens that end the text.
        stops: Strings that end it; neither is part of it.
        sampling: How tokens are drawn.

    Raises:
        UsageError: A stop string is empty.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        ids: Sequence[int],
        most: int,
        *,
        ends: Collection[int] = (),
        stops: Sequence[str] = (),
        sampling: Sampling = GREEDY,
    ) -> None:
        self.ids, self.tokens, self.times = ids, list[int](), list[float]()
        self.rounds: list[tuple[int, int]] = []
        self.finish_reason: FinishReason | None = None if most > 0 else "length"
        self._most, self._ends = most, ends
        self._sampler = Sampler(sampling, ids)
        self._characters = CharacterStream(tokenizer, ids)
        self._stops = StopStrings(stops)

    @property
    def left(self) -> int:
        """Tokens that may still be drawn."""
        return self._most - len(self.tokens)

    def foreseen(self, logits: Logits, ahead: Sequence[int]) -> int:
        """The token that `add` would draw from these logits after `ahead`, tokens that may be drawn next."""
        return self._sampler.foreseen(logits, ahead)

    def add(self, logits: Logits) -> str:
        """Draws the next token; the text that is certain with it.

        Args:
            logits: What follows the tokens so far, float32 [vocab].
        """
        token = self._sampler.draw(logits)
        self.times.append(time.perf_counter())
        text = ""
        if token in self._ends:
            self.finish_reason = "stop"
        else:
            self.tokens.append(token)
            text = self._stops.push(self._characters.push(token))
            if self._stops.found:
                self.finish_reason = "stop"
            elif len(self.tokens) >= self._most:
                self.finish_reason = "length"
        return text if self.finish_reason is None else text + self._stops.rest()


def write(session: DecodeSession, completions: Sequence[Completion], logits: Logits) -> Iterator[tuple[int, str]]:
    """Writes completions to their ends, all of them by a token in each run.

    Args:
        session: Its sequences hold the prompts, in this order. It drops each that has ended, except the last.
        completions: The texts.
        logits: What follows the prompts, float32 [completions, vocab].

    Yields:
        The place of a completion and a piece of its text, which may be empty, for every token.

    Raises:
        UsageError: The cache is full.
        ArtifactError: onnxruntime fails on the graph.
    """
    places = list(range(len(completions)))
    while places:
        # From the end, so that the sequence that takes the row of a dropped one has had its turn.
        for row in reversed(range(len(places))):
            completion = completions[places[row]]
            if completion.finish_reason is None:
                yield places[row], completion.add(logits[row])
            if completion.finish_reason is not None:
                places[row] = places[-1]
                places.pop()
                if places:
                    session.drop(row)
        if places:
            logits = session.step([completions[place].tokens[-1:] for place in places])[:, -1]
