"""Text generation from an exported folder: greedy or sampled, streamed as it comes."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from kvslim.errors import ArtifactError, NotFoundError, UsageError
from kvslim.runtime.graph import Logits
from kvslim.runtime.session import DecodeSession

_CONTEXT_TOKENS = 6
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    """What streaming needs of a `tokenizers.Tokenizer`."""

    def decode(self, ids: Sequence[int], /) -> str:
        """The text of token ids."""


def generate(
    folder: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    max_context: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    threads: int | None = None,
) -> Iterator[str]:
    """Continues a prompt and yields the text in pieces, without the prompt and the end-of-sequence token.

    Args:
        folder: Folder with model.onnx, tokenizer.json and generation_config.json.
        prompt: Text to continue.
        max_new_tokens: Tokens to generate at most.
        max_context: Positions of the model, where the text ends at the latest; None for no limit.
        temperature: 0 takes the most likely token; otherwise what the logits are divided by.
        top_k: Sample from this many most likely tokens; 0 for all.
        top_p: Sample from the smallest set of most likely tokens that holds this probability.
        seed: Seed of the sampling.
        threads: Threads of one operator; None leaves the choice to onnxruntime.

    Raises:
        UsageError: An option is out of range, or the prompt has no tokens or more than the model has positions.
        NotFoundError: A file of the folder is missing.
        ArtifactError: A file of the folder is broken.
    """
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(prompt).ids
    if max_context is not None:
        if len(ids) >= max_context:
            raise UsageError(
                f"the prompt has {len(ids)} tokens, the model {max_context} positions",
                where="prompt",
                fix="shorten the prompt",
            )
        max_new_tokens = min(max_new_tokens, max_context - len(ids))
    session = DecodeSession(folder, capacity=max(1, len(ids) + max_new_tokens), threads=threads)
    tokens = generate_tokens(
        session,
        ids,
        max_new_tokens=max_new_tokens,
        stop=eos_ids(folder),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    return stream_text(tokenizer, ids, tokens)


def generate_tokens(
    session: DecodeSession,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop: Collection[int] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Continues a prompt from an emptied cache and yields token ids; a stop token ends it and is not yielded.

    Args:
        session: Model with room for the prompt and all but the last new token.
        prompt_ids: Token ids, at least one.
        max_new_tokens: Tokens to generate at most.
        stop: Ids that end the text.
        temperature: As for `generate`.
        top_k: As for `generate`.
        top_p: As for `generate`.
        seed: As for `generate`.

    Raises:
        UsageError: An option is out of range, the prompt is empty, or the cache is full.
        ArtifactError: onnxruntime fails on the graph.
    """
    _check_options(temperature, top_k, top_p)
    generator = np.random.default_rng(seed)
    session.reset()
    logits = session.prefill(prompt_ids)
    for count in range(max_new_tokens):
        token = sample(logits, generator, temperature=temperature, top_k=top_k, top_p=top_p)
        if token in stop:
            return
        yield token
        if count + 1 < max_new_tokens:
            logits = session.step([token])[-1]


def sample(
    logits: Logits, generator: np.random.Generator, *, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0
) -> int:
    """Draws one token; temperature first, then top-k, then top-p over what top-k left, as in transformers.

    Args:
        logits: float32 [vocab].
        generator: Source of randomness; untouched at temperature 0.
        temperature: 0 for the most likely token.
        top_k: 0 for all tokens.
        top_p: Probability that the kept tokens must hold, in (0, 1].
    """
    if temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    scaled = logits[order].astype(np.float64) / temperature
    weights = np.exp(scaled - scaled[0])
    before = np.cumsum(weights) - weights
    weights[before >= top_p * weights.sum()] = 0
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
        return frozenset([found] if isinstance(found, int) else found or ())
    except (ValueError, AttributeError, TypeError) as error:
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


def _check_options(temperature: float, top_k: int, top_p: float) -> None:
    if not (temperature >= 0 and top_k >= 0 and 0 < top_p <= 1):
        raise UsageError(
            f"cannot sample with temperature {temperature}, top_k {top_k}, top_p {top_p}",
            where="generate",
            fix="use temperature >= 0, top_k >= 0 and 0 < top_p <= 1",
        )
