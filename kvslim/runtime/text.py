"""Generating text with an artifact: what `kvslim.load` returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from kvslim.errors import UnsupportedError, UsageError
from kvslim.export.manifest import read_runnable
from kvslim.runtime.completion import Completer, PromptEncoder
from kvslim.runtime.generate import Sampling
from kvslim.runtime.template import Messages
from kvslim.types import Manifest


class TextGenerator:
    """An artifact that continues texts and answers messages, one at a time.

    The cache is kept between calls: a prompt that begins like the one before only runs the part that is new.

    Args:
        folder: A folder that `kvslim.compress` wrote.
        context: Tokens that the cache has room for; None for the context that the artifact was made for.
        threads: Threads of one operator; None leaves the choice to onnxruntime.

    Raises:
        UsageError: The context is not positive, or longer than the model allows.
        NotFoundError, ArtifactError: A file of the folder is missing or broken.
        UnsupportedError: The model is an encoder.
    """

    def __init__(self, folder: Path, *, context: int | None = None, threads: int | None = None) -> None:
        manifest = read_decoder(folder, context, option="context")
        capacity = min(manifest.context, manifest.spec.max_context) if context is None else context
        self._encoder = PromptEncoder(folder)
        self._completer = Completer(folder, self._encoder.tokenizer, capacity=capacity, threads=threads)

    def generate(
        self,
        prompt: str | Messages,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """Streams the text that follows a prompt, in pieces of whole characters.

        Args:
            prompt: A text to continue, or messages with `role` and `content` for the chat template.
            max_new_tokens: Tokens to generate at most; a full cache ends the text too.
            temperature: 0 takes the most likely token; higher values give more varied text.
            seed: Seed of the sampling.
            stop: Strings that end the text; they are not part of it.

        Raises:
            UsageError: The cache has no room for the prompt, an option is out of range, or there are messages and no
                chat template.
            ArtifactError: onnxruntime fails on the graph.
        """
        stops = [stop] if isinstance(stop, str) else stop
        if "" in stops:
            raise UsageError("a stop string is empty", where="stop", fix="give at least one character")
        sampling = Sampling(temperature=temperature, seed=seed)
        ids = self._encoder.prompt(prompt) if isinstance(prompt, str) else self._encoder.chat(prompt)
        pieces = self._completer.stream(ids, max_new_tokens, sampling)
        return until_stop(pieces, stops)


def read_decoder(folder: Path, context: int | None, option: str) -> Manifest:
    """The manifest of an artifact that is to generate text.

    Args:
        folder: The artifact.
        context: Tokens that its cache should have room for; None for no wish.
        option: What set the context, for the error.

    Raises:
        NotFoundError, ArtifactError: There is no manifest, or it is broken.
        UnsupportedError: The model is an encoder, or onnxruntime is too old.
        UsageError: The context is longer than the model allows.
    """
    manifest = read_runnable(folder)
    spec = manifest.spec
    if spec.is_encoder:
        raise UnsupportedError(
            "an encoder writes no text", where=str(folder), fix="embed texts with `kvslim.runtime.encoder`"
        )
    if context is not None and context > spec.max_context:
        raise UsageError(
            f"{context} tokens are more than the model's {spec.max_context} positions",
            where=option,
            fix=f"{option} {spec.max_context}",
        )
    return manifest


def until_stop(pieces: Iterator[str], stops: Sequence[str]) -> Iterator[str]:
    """A text up to the first stop string in it.

    A stop string may arrive in several pieces, so a tail that could be the start of one is held back until more of the
    text is known.
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [place for place in map(held.find, stops) if place >= 0]
        if found:
            held = held[: min(found)]
            break
        safe = len(held) - _start_of_stop(held, stops)
        if safe:
            yield held[:safe]
        held = held[safe:]
    if held:
        yield held


def _start_of_stop(text: str, stops: Sequence[str]) -> int:
    """The length of the longest tail of a text that a stop string begins with."""
    longest = max(map(len, stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
