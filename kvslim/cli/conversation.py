"""`kvslim generate --interactive`: a conversation, line by line."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from kvslim.cli import console
from kvslim.cli.completions import Generation, show


def converse(generation: Generation) -> int:
    """Answers the lines of stdin until it ends; returns the exit code."""
    completer, turns = generation.completer(), Turns(generation)
    for line in _typed_lines():
        answer = show(completer, turns.ask(line), {"prompt": line}, "", generation.options)
        turns.add_answer(answer)
    return 0


class Turns:
    """The prompt of each turn: the conversation so far in the chat template, or as plain text if there is none."""

    def __init__(self, generation: Generation) -> None:
        self._encoder = generation.encoder
        self._has_template = generation.has_template
        self._messages = generation.system_message()
        self._text = ""
        if not self._has_template:
            console.hint("hint: the tokenizer has no chat template; each line is appended to the text so far")

    def ask(self, line: str) -> list[int]:
        """The token ids of all turns and this one."""
        if not self._has_template:
            self._text += line
            return self._encoder.prompt(self._text)
        self._messages.append({"role": "user", "content": line})
        return self._encoder.chat(self._messages)

    def add_answer(self, text: str) -> None:
        """Adds the model's answer to the conversation."""
        self._text += text
        self._messages.append({"role": "assistant", "content": text})


def _typed_lines() -> Iterator[str]:
    """The lines of stdin that are not blank. A terminal gets a prompt sign."""
    is_terminal = sys.stdin.isatty()
    while True:
        if is_terminal:
            console.mark("> ")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\r\n")
