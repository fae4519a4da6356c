"""What every mode of `kvslim generate` shares: the options, the prompt's ids, the cache, and how text is printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvslim.cli import console
from kvslim.errors import UsageError
from kvslim.runtime.completion import Completer, PromptEncoder, Usage
from kvslim.runtime.generate import Sampling
from kvslim.runtime.template import ChatTemplate
from kvslim.runtime.text import read_decoder

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Options:
    """The options for all prompts.

    Attributes:
        chat: Whether a prompt is a message of the user, for the chat template.
        system: The system message of a conversation.
        max_new_tokens: Tokens of a completion at most.
        context: Tokens to allocate the cache for; None for as many as the prompt needs.
        sampling: How tokens are drawn.
        stops: Strings that end a completion.
        batch: Prompts of a file that are completed at once.
        threads: Threads of one operator.
        as_json: Whether to print JSON in place of text.
    """

    chat: bool
    system: str | None
    max_new_tokens: int
    context: int | None
    sampling: Sampling
    stops: tuple[str, ...]
    batch: int
    threads: int | None
    as_json: bool


class Generation:
    """An opened artifact and the options that hold for all its prompts.

    Args:
        artifact: The folder.
        options: The options for all prompts.

    Raises:
        KvslimError: The artifact cannot be read, writes no text, or does not fit the options.
    """

    def __init__(self, artifact: Path, options: Options) -> None:
        self.artifact, self.options = artifact, options
        self.manifest = read_decoder(artifact, options.context, option="--context")
        if options.chat and not self.has_template:
            raise UsageError(
                "the tokenizer has no chat template", where=str(artifact), fix="leave out --chat and --system"
            )
        self.encoder = PromptEncoder(artifact, self.manifest.spec.vocab_size)

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return ChatTemplate.exists(self.artifact)

    def ids(self, prompt: str) -> list[int]:
        """The token ids of a prompt, as a text or as a user's message."""
        if not self.options.chat:
            return self.encoder.prompt(prompt)
        return self.encoder.chat([*self.system_message(), {"role": "user", "content": prompt}])

    def system_message(self) -> list[dict[str, str]]:
        """The system message of the options; empty if there is none."""
        system = self.options.system
        return [] if system is None else [{"role": "system", "content": system}]

    def completer(self, capacity: int | None = None, batch: int = 1) -> Completer:
        """A cache for `capacity` tokens of each of `batch` prompts.

        The capacity is by default `--context`, or the context that the artifact was made for.
        """
        default = min(self.manifest.context, self.manifest.spec.max_context)
        capacity, threads = capacity or self.options.context or default, self.options.threads
        return Completer(self.artifact, self.encoder.tokenizer, capacity=capacity, batch=batch, threads=threads)


def complete(generation: Generation, prompt: str) -> int:
    """Completes one prompt, in a cache with just the room it needs. Plain text is printed before what follows it.

    Raises:
        UsageError: The prompt is longer than the model allows.
    """
    options, most = generation.options, generation.manifest.spec.max_context
    ids = generation.ids(prompt)
    if len(ids) >= most:
        raise UsageError(
            f"the prompt has {len(ids)} tokens, but the model has only {most} positions",
            where="--prompt",
            fix="shorten the prompt",
        )
    completer = generation.completer(min(most, options.context or len(ids) + options.max_new_tokens))
    show(completer, ids, {"prompt": prompt}, "" if options.chat else prompt, options)
    return 0


def show(completer: Completer, ids: Sequence[int], record: Record, before: str, options: Options) -> str:
    """Streams a completion to stdout and its usage to stderr, or prints both as one JSON object.

    Args:
        completer: The cache.
        ids: Tokens of the whole prompt.
        record: What the JSON object starts with.
        before: Text to print in front of the completion.
        options: The options for all prompts.

    Returns:
        The completion.
    """
    pieces = completer.stream(ids, options.max_new_tokens, options.sampling, options.stops)
    if options.as_json:
        text = "".join(pieces)
        console.print_json("generate", {**record, "completion": text, **usage_of(completer).model_dump(mode="json")})
        return text
    text = ""
    console.print_text(before)
    for piece in pieces:
        console.print_text(piece)
        text += piece
    console.print_text("\n")
    console.hint(usage_line(usage_of(completer)))
    return text


def usage_of(completer: Completer) -> Usage:
    """Counts and times of a completion that was read to its end."""
    usage = completer.usage
    if usage is None:
        raise RuntimeError("the completion was not read to its end")
    return usage


def usage_line(usage: Usage) -> str:
    """Counts, speed and memory of a completion in one line."""
    speed = "" if usage.tokens_per_second is None else f" at {usage.tokens_per_second:.1f} per second"
    cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
    end = ", interrupted" if usage.finish_reason == "interrupted" else ""
    return (
        f"{usage.prompt_tokens} prompt tokens{cached}, {usage.new_tokens} new{speed}{end}, "
        f"first after {usage.ttft_ms:.3g} ms; context {usage.context_tokens} of {usage.context_capacity}, "
        f"KV cache {usage.kv_mib:.3g} MiB"
    )
