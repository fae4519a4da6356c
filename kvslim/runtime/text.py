"""Generating text with an artifact: what `kvslim.load` returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from kvslim.errors import UnsupportedError, UsageError
from kvslim.export.manifest import read_runnable
from kvslim.messages import read_messages
from kvslim.runtime.completion import Completer, PromptEncoder, Usage
from kvslim.runtime.generate import Sampling
from kvslim.types import Draft, Manifest

if TYPE_CHECKING:
    from kvslim.messages import Messages

Speculative = Literal["auto", "none"]


class TextGenerator:
    """An artifact that continues texts and answers messages.

    The cache is kept between calls of `generate`: a prompt that begins like the one before only runs the part that is
    new.

    Args:
        folder: A folder that `kvslim.compress` wrote.
        context: Tokens that the cache has room for; None for the context that the artifact was made for.
        threads: Threads of one operator; None leaves the choice to onnxruntime.
        speculative: `auto` lets the artifact's draft, if it has one, propose tokens where that saves time; `none` does
            not.

    Raises:
        UsageError: The context is not positive, or longer than the model allows.
        NotFoundError, ArtifactError: A file of the folder is missing or broken.
        UnsupportedError: The model is an encoder.
    """

    def __init__(
        self,
        folder: Path,
        *,
        context: int | None = None,
        threads: int | None = None,
        speculative: Speculative = "auto",
    ) -> None:
        manifest = read_decoder(folder, context, option="context")
        capacity = min(manifest.context, manifest.spec.max_context) if context is None else context
        self._encoder = PromptEncoder(folder, manifest.spec.vocab_size)
        draft = used_draft(manifest, speculative)
        self._completer = Completer(folder, self._encoder.tokenizer, capacity=capacity, threads=threads, draft=draft)

    @property
    def usage(self) -> Usage | None:
        """What the last text of `generate` took, once it was read to its end; None before."""
        return self._completer.usage

    def generate(
        self,
        prompt: str | Messages,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        repetition_penalty: float = 1.0,
    ) -> Iterator[str]:
        """Streams the text that follows a prompt, in pieces of whole characters.

        Args:
            prompt: A text to continue, or messages with `role` and `content` for the chat template.
            max_new_tokens: Tokens to generate at most; a full cache ends the text too.
            temperature: 0 takes the most likely token; higher values give more varied text.
            top_k: Tokens to draw from, the most likely ones; 0 for all.
            top_p: Probability of the smallest set of most likely tokens to draw from, in (0, 1].
            seed: Seed of the sampling.
            stop: Strings that end the text; they are not part of it.
            repetition_penalty: Above 1, tokens that the prompt or the text has already become less likely.

        Raises:
            UsageError: The cache has no room for the prompt, an option is out of range, or there are messages and no
                chat template.
            ArtifactError: onnxruntime fails on the graph.
        """
        sampling = Sampling(temperature, top_k, top_p, seed, repetition_penalty)
        return filter(None, self._completer.stream(self._ids(prompt), max_new_tokens, sampling, _strings(stop)))

    def generate_batch(
        self,
        prompts: Sequence[str | Messages],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        repetition_penalty: float = 1.0,
    ) -> list[str]:
        """The texts that follow several prompts of any lengths, written side by side.

        That is faster than one after another, as weights are read once for all of them, and takes a cache for each.

        Args:
            prompts: Texts to continue, or messages, as for `generate`; the other arguments are as there too.
            max_new_tokens: Tokens to generate for each at most.
            temperature: As for `generate`.
            top_k: As for `generate`.
            top_p: As for `generate`.
            seed: As for `generate`, of each text anew.
            stop: As for `generate`.
            repetition_penalty: As for `generate`.

        Raises:
            UsageError: As `generate`, or the artifact's cache holds one sequence at a time.
            ArtifactError: onnxruntime fails on the graph.
        """
        sampling = Sampling(temperature, top_k, top_p, seed, repetition_penalty)
        ids = [self._ids_of(place, prompt) for place, prompt in enumerate(prompts)]
        return [text for text, _ in self._completer.complete(ids, max_new_tokens, sampling, _strings(stop))]

    def _ids_of(self, place: int, prompt: str | Messages) -> list[int]:
        """The ids of one of several prompts; errors name its place."""
        try:
            ids = self._ids(prompt)
            self._completer.check(ids)
        except UsageError as error:
            raise UsageError(error.message, where=f"prompts[{place}]", fix=error.fix) from error
        return ids

    def _ids(self, prompt: str | Messages) -> list[int]:
        if isinstance(prompt, str):
            return self._encoder.prompt(prompt)
        messages = list(prompt) if isinstance(prompt, Sequence) else prompt
        return self._encoder.chat(read_messages(messages, "messages"))


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


def used_draft(manifest: Manifest, speculative: Speculative) -> Draft | None:
    """The draft that is to propose tokens; None for none.

    Raises:
        UsageError: `speculative` is another word.
    """
    if speculative not in get_args(Speculative):
        raise UsageError(f"speculative is {speculative!r}", where="speculative", fix="use auto or none")
    return manifest.draft if speculative == "auto" else None


def _strings(stop: str | Sequence[str]) -> Sequence[str]:
    return [stop] if isinstance(stop, str) else stop
