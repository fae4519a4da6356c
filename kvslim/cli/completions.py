"""What verbs that write text share: the options, the prompt's ids, the cache, and how text is printed."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvslim.cli import console
from kvslim.errors import UsageError
from kvslim.runtime.completion import Completer, PromptEncoder, Usage
from kvslim.runtime.generate import Sampling
from kvslim.runtime.text import Speculative, read_decoder, used_draft

Record = Mapping[str, Any]
MOST_WITHOUT_TEMPLATE = 128


@dataclass(frozen=True)
class Options:
    """The options for all prompts.

    Attributes:
        chat: Whether `--chat` makes a prompt a message of the user.
        system: The system message of a conversation, of which a prompt then is a message too.
        max_new_tokens: Tokens of a completion at most; None for as many as the model writes.
        context: Tokens to allocate the cache for; None for as many as the prompt needs.
        sampling: How tokens are drawn.
        stops: Strings that end a completion.
        threads: Threads of one operator.
        speculative: Whether the artifact's draft proposes tokens.
        as_json: Whether to print JSON in place of text.
    """

    chat: bool
    system: str | None
    max_new_tokens: int | None
    context: int | None
    sampling: Sampling
    stops: tuple[str, ...]
    threads: int | None
    speculative: Speculative
    as_json: bool

    @property
    def of_templates(self) -> tuple[str, ...]:
        """The options that are given for which prompts go through the chat template."""
        return ("--chat",) * self.chat + ("--system",) * (self.system is not None)


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
        if options.of_templates and not self.has_template:
            fix = f"leave out {' and '.join(options.of_templates)}"
            raise UsageError("the tokenizer has no chat template", where=str(artifact), fix=fix)
        self.encoder = PromptEncoder(artifact, self.manifest.spec.vocab_size)

    @property
    def most(self) -> int:
        """Tokens of a completion at most. A model without a chat template may have no end in sight."""
        if self.options.max_new_tokens is not None:
            return self.options.max_new_tokens
        return sys.maxsize if self.has_template else MOST_WITHOUT_TEMPLATE

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        from kvslim.runtime.template import ChatTemplate

        return ChatTemplate.exists(self.artifact)

    def ids(self, prompt: str) -> list[int]:
        """The token ids of a prompt, as a text or as a user's message."""
        if not self.options.of_templates:
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
        draft = used_draft(self.manifest, self.options.speculative) if batch == 1 else None
        tokenizer = self.encoder.tokenizer
        return Completer(self.artifact, tokenizer, capacity=capacity, batch=batch, threads=threads, draft=draft)

    def stream(self, completer: Completer, ids: Sequence[int]) -> Generator[str, None, None]:
        """The text that follows a prompt, as `Completer.stream` gives it."""
        return completer.stream(ids, self.most, self.options.sampling, self.options.stops)


def complete(generation: Generation, prompt: str) -> int:
    """Completes one prompt, in a cache with just the room it needs, and streams it to stdout.

    A plain prompt is printed before what follows it, and usage on stderr; with `--json` all is one object.

    Raises:
        UsageError: The prompt is longer than the model allows.
    """
    options, positions = generation.options, generation.manifest.spec.max_context
    ids = generation.ids(prompt)
    if len(ids) >= positions:
        raise UsageError(
            f"the prompt has {len(ids)} tokens, but the model has only {positions} positions",
            where="--prompt",
            fix="shorten the prompt",
        )
    completer = generation.completer(min(positions, options.context or len(ids) + generation.most))
    pieces = generation.stream(completer, ids)
    if options.as_json:
        answer = {"prompt": prompt, "completion": "".join(pieces)}
        console.print_json("generate", answer | usage_of(completer).model_dump(mode="json"))
        return 0
    for piece in itertools.chain(["" if options.of_templates else prompt], pieces, ["\n"]):
        console.print_text(piece)
    console.hint(usage_line(usage_of(completer)))
    return 0


def usage_of(completer: Completer) -> Usage:
    """Counts and times of a completion that was read to its end, or closed."""
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
        f"{usage.prompt_tokens} prompt tokens{cached}, {usage.new_tokens} new{speed}{_rounds(usage)}{end}, "
        f"first after {usage.ttft_ms:.3g} ms; context {usage.context_tokens} of {usage.context_capacity}, "
        f"KV cache {usage.kv_mib:.3g} MiB"
    )


def _rounds(usage: Usage) -> str:
    """What a draft did, beginning with a comma; nothing without one."""
    if usage.tokens_per_round is None:
        return ""
    if not usage.proposed_tokens:
        return ", nothing proposed"
    share = usage.accepted_tokens / usage.proposed_tokens
    right = f"{usage.accepted_tokens} of {usage.proposed_tokens} proposals right ({share:.0%})"
    return f", {usage.tokens_per_round:.2f} a run, {right}"
