"""Tokens from an exported folder, greedy or sampled, and the text that they make as they come."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from kvslim.errors import ArtifactError, NotFoundError, UsageError
from kvslim.runtime.opening import Logits
from kvslim.runtime.session import DecodeSession

_CONTEXT_TOKENS = 6
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    """What streaming needs of a `tokenizers.Tokenizer`."""

    def decode(self, ids: Sequence[int], /) -> str:
        """The text of token ids."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: 0 takes the most likely token; otherwise what the logits are divided by.
        top_k: Sample from this many most likely tokens; 0 for all.
        top_p: Sample from the smallest set of most likely tokens that holds this probability, in (0, 1].
        seed: Seed of the sampling.

    Raises:
        UsageError: An option is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < math.inf and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise UsageError(
                f"cannot sample with temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}",
                where="generate",
                fix="use temperature >= 0, top_k >= 0 and 0 < top_p <= 1",
            )


GREEDY = Sampling()


def generate_tokens(
    session: DecodeSession,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop: Collection[int] = (),
    sampling: Sampling = GREEDY,
) -> Iterator[int]:
    """Appends a prompt to the cache, and yields the token ids that follow; a stop token ends it and is not yielded.

    Args:
        session: Model with room for the prompt and all but the last new token.
        prompt_ids: Token ids behind those in the cache, at least one.
        max_new_tokens: Tokens to generate at most.
        stop: Ids that end the text.
        sampling: How tokens are drawn.

    Raises:
        UsageError: The prompt is empty, or the cache is full.
        ArtifactError: onnxruntime fails on the graph.
    """
    generator = np.random.default_rng(sampling.seed)
    logits = session.prefill(prompt_ids)
    for count in range(max_new_tokens):
        token = sample(logits, generator, sampling)
        if token in stop:
            return
        yield token
        if count + 1 < max_new_tokens:
            logits = session.step([token])[-1]


def sample(logits: Logits, generator: np.random.Generator, sampling: Sampling = GREEDY) -> int:
    """Draws one token; temperature first, then top-k, then top-p over what top-k left, as in transformers.

    Args:
        logits: float32 [vocab].
        generator: Source of randomness; untouched at temperature 0.
        sampling: Temperature, top-k and top-p.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[: sampling.top_k or None]
    below = logits[order].astype(np.float64) - logits[order[0]]
    with np.errstate(over="ignore"):  # so cold that all but the most likely are out of reach
        weights = np.exp(below / sampling.temperature)
    before = np.cumsum(weights) - weights
    weights[before >= sampling.top_p * weights.sum()] = 0
    return int(generator.choice(order, p=weights / weights.sum()))


def stream_text(tokenizer: Decoder, prompt_ids: Sequence[int], tokens: Iterator[int]) -> Iterator[str]:
    """The text that tokens add to a prompt, in pieces that are whole characters.

    A decoder drops the space before the first token it is given and turns part of a multi-byte character into U+FFFD.
    So new tokens are decoded after those already shown, and shown once they end in a whole character.

    Args:
        tokenizer: Decoder of ids.
        prompt_ids: The tokens before the first of `tokens`.
        tokens: New token ids.
    """
    pending = list(prompt_ids[-_CONTEXT_TOKENS:])
    shown, text = len(pending), ""
    for token in tokens:
        pending.append(token)
        text = _added(tokenizer, pending, shown)
        if text and not text.endswith(_INCOMPLETE):
            yield text
            pending, text = pending[shown:], ""
            shown = len(pending)
    if text:
        yield text


def _added(tokenizer: Decoder, ids: Sequence[int], shown: int) -> str:
    return tokenizer.decode(ids)[len(tokenizer.decode(ids[:shown])) :]


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, set to neither pad nor cut.

    Raises:
        NotFoundError: There is no tokenizer.json.
        ArtifactError: It cannot be read.
    """
    path = folder / "tokenizer.json"
    text = _read(path)
    try:
        tokenizer = Tokenizer.from_str(text)
    # The library raises Exception itself.
    except Exception as error:
        raise ArtifactError(
            f"cannot read the tokenizer: {error}", where=str(path), fix="export the model again"
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def eos_ids(folder: Path) -> frozenset[int]:
    """The ids that end a text, from generation_config.json; empty if it names none.

    Raises:
        NotFoundError: There is no generation_config.json.
        ArtifactError: It cannot be read.
    """
    path = folder / "generation_config.json"
    try:
        found = json.loads(_read(path)).get("eos_token_id")
        ids = [found] if isinstance(found, int) else found or ()
        if not all(isinstance(token, int) for token in ids):
            raise TypeError(f"eos_token_id is {found!r}")
        return frozenset(ids)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"cannot read the stop tokens: {error}", where=str(path), fix="export the model again"
        ) from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise NotFoundError(
            f"cannot open {path.name}", where=str(path), fix="name a folder that `kvslim compress` wrote"
        ) from error
    except UnicodeDecodeError as error:
        raise ArtifactError(
            f"{path.name} is not UTF-8: {error}", where=str(path), fix="export the model again"
        ) from error
