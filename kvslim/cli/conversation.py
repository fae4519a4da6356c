"""A conversation: its turns so far, the answer to the next message, and commands for what is no message."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable

from kvslim.cli import console
from kvslim.cli.completions import Generation, usage_line, usage_of
from kvslim.cli.keyboard import interruptible, piped_lines, typed_lines
from kvslim.errors import UsageError
from kvslim.runtime.completion import Usage

COMMANDS = {
    "/stats": "counts and speed of the last answer",
    "/clear": "forget the conversation and begin a new one",
    "/help": "this list",
    "/exit": "end the conversation, as Ctrl-D does",
}
COMMAND = re.compile(r"/\w+")
KEYS = "Ctrl-C stops an answer; arrow keys edit a message and bring earlier ones back"


def converse(generation: Generation) -> int:
    """Answers messages until stdin ends; returns the exit code. On a terminal, faults leave the conversation alive.

    Raises:
        UsageError: A message of a file or a pipe has no room in the cache, or is no text.
    """
    conversation = Conversation(generation)
    if not sys.stdin.isatty():
        for line in piped_lines():
            conversation.answer(line)
        return 0
    console.hint("hint: /help lists commands and keys")
    for line in typed_lines():
        command = line.strip()
        if command == "/exit":
            break
        if COMMAND.fullmatch(command):
            _obey(command, conversation)
            continue
        try:
            with interruptible() as interrupted:
                conversation.answer(line, interrupted)
        except UsageError as error:
            console.print_error(error)
            console.hint("hint: /clear begins a new conversation")
    return 0


class Conversation:
    """The turns so far, in the chat template, or as plain text if there is none; and the cache that holds them.

    Attributes:
        usage: What the last answer took; None before the first.
    """

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._completer = generation.completer()
        self.usage: Usage | None = None
        self.clear()
        if not generation.has_template:
            console.hint("hint: the tokenizer has no chat template; each line is appended to the text so far")

    def clear(self) -> None:
        """Forgets all turns."""
        self._messages, self._text = self._generation.system_message(), ""

    def answer(self, line: str, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Streams the answer to a message to stdout; with `--json`, prints it as an object on a line.

        Args:
            line: The message.
            interrupted: Whether the answer is to end where it is. It stays in the conversation, unless it is empty.

        Raises:
            UsageError: The message is no text, or all turns together have no room in the cache.
        """
        as_json, text = self._generation.options.as_json, ""
        with contextlib.closing(self._generation.stream(self._completer, self._ids(line))) as pieces:
            for piece in pieces:
                if interrupted():
                    break
                text += piece
                if not as_json:
                    console.print_text(piece)
        self.usage = usage_of(self._completer)
        if as_json:
            named = {"schema": console.schema_id("chat"), "prompt": line, "completion": text}
            console.print_json_line(named | self.usage.model_dump(mode="json"))
        else:
            console.print_text("\n")
            _warn_of_a_full_cache(self.usage)
        if text or not interrupted():
            self._add(line, text)

    def _ids(self, line: str) -> list[int]:
        encoder = self._generation.encoder
        if not self._generation.has_template:
            return encoder.prompt(self._text + line)
        return encoder.chat([*self._messages, {"role": "user", "content": line}])

    def _add(self, line: str, text: str) -> None:
        self._text += line + text
        self._messages += [{"role": "user", "content": line}, {"role": "assistant", "content": text}]


def _obey(command: str, conversation: Conversation) -> None:
    """Does what a command asks for."""
    match command:
        case "/stats" if conversation.usage:
            console.hint(usage_line(conversation.usage))
        case "/stats":
            console.hint("hint: there is no answer yet")
        case "/clear":
            conversation.clear()
        case "/help":
            for name, words in COMMANDS.items():
                console.hint(f"{name:8}{words}")
            console.hint(KEYS)
        case _:
            console.hint(f"hint: no command {command!r}; /help lists them, and a space in front makes it a message")


def _warn_of_a_full_cache(usage: Usage) -> None:
    if usage.finish_reason == "length" and usage.context_tokens >= usage.context_capacity:
        console.hint(f"hint: the context of {usage.context_capacity} tokens is full; --context gives more")
