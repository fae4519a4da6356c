"""`kvslim chat`: a conversation through a pipe, and one on a terminal."""

from __future__ import annotations

import itertools
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.terminal import PROMPT, Terminal
from support.tiny_chat import completed, write_chat
from support.verbs import Run, give_stdin, runner

from kvslim.cli import app
from kvslim.cli.conversation import COMMANDS
from kvslim.cli.schemas import output_type
from kvslim.runtime.completion import Completer

SHORT = ("-n", "6")


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write_chat(tmp_path / "artifact")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The artifact of a model without a chat template."""
    return write_chat(tmp_path / "base", template=None)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `kvslim chat` with the given stdin; returns exit code, stdout and stderr."""

    def call(*arguments: object, stdin: str | bytes) -> tuple[int, str, str]:
        give_stdin(monkeypatch, stdin)
        return runner(capsys, "chat")(*arguments)

    return call


def answers(text: str) -> list[dict[str, Any]]:
    """The objects of lines, each of which is of its schema."""
    found = [json.loads(line) for line in text.splitlines()]
    for answer in found:
        output_type("chat").model_validate(answer)
    return found


def test_pipe_gives_answers_alone(run: Run, artifact: Path) -> None:
    code, out, err = run(artifact, *SHORT, stdin="one")
    assert (code, out, err) == (0, completed(artifact, "<user>one\n<assistant>") + "\n", "")


def test_conversation_keeps_its_cache_and_answers_as_from_scratch(run: Run, artifact: Path) -> None:
    code, out, err = run(artifact, "--system", "S", *SHORT, "--json", "--context", "200", stdin="one\n\ntwo\r\n")
    first, second = answers(out)
    turns = "<system>S\n<user>one\n<assistant>"
    assert first["completion"] == completed(artifact, turns)
    turns += f"{first['completion']}\n<user>two\n<assistant>"
    assert second["completion"] == completed(artifact, turns)
    assert (first["prompt"], second["prompt"]) == ("one", "two")
    assert (first["cached_tokens"], second["prompt_tokens"]) == (0, len(turns.encode()))
    assert second["cached_tokens"] >= first["prompt_tokens"]
    assert (code, err) == (0, "")


@pytest.mark.parametrize(("options", "tokens"), [((), 512 - len("<user>one\n<assistant>")), (("-n", "200"), 200)])
def test_answer_is_as_long_as_the_model_makes_it(
    run: Run, artifact: Path, options: tuple[str, ...], tokens: int
) -> None:
    _, out, _ = run(artifact, *options, "--json", "--context", "512", stdin="one\n")
    assert answers(out)[0]["new_tokens"] == tokens


def test_full_context_is_told(run: Run, artifact: Path) -> None:
    code, out, err = run(artifact, stdin="one\n")
    assert (code, out) == (0, completed(artifact, "<user>one\n<assistant>", 64 - 21) + "\n")
    assert err == "hint: the context of 64 tokens is full; --context gives more\n"


def test_conversation_goes_on_with_the_text_when_there_is_no_template(run: Run, base: Path) -> None:
    code, out, err = run(base, "--json", "--context", "512", stdin="one\ntwo\n")
    first, second = answers(out)
    assert (first["new_tokens"], second["new_tokens"]) == (128, 128)
    assert second["completion"] == completed(base, f"one{first['completion']}two", 128)
    assert code == 0
    assert err.startswith("hint: the tokenizer has no chat template")


def test_pipe_ends_with_an_error_when_the_cache_is_full(run: Run, artifact: Path) -> None:
    code, out, err = run(artifact, *SHORT, "--context", "30", stdin="one\ntwo\nthree\n")
    assert code == 2
    assert out == completed(artifact, "<user>one\n<assistant>") + "\n"
    assert "leave no room in a cache of 30" in err


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        (["--context", "513"], "", "more than the model's 512 positions"),
        (["-n", "0"], "", "--max-new-tokens"),
        (["--stop", ""], "", "a stop string is empty"),
        ([], b"\xff\n", "not Unicode"),
    ],
)
def test_chat_refuses_what_it_cannot_do(
    run: Run, artifact: Path, arguments: list[str], stdin: str | bytes, words: str
) -> None:
    code, out, err = run(artifact, *arguments, stdin=stdin)
    assert (code, out) == (2, "")
    assert words in err


def test_system_message_needs_a_template(run: Run, base: Path) -> None:
    code, out, err = run(base, "--system", "S", stdin="one\n")
    assert (code, out) == (2, "")
    assert "no chat template" in err
    assert "fix: leave out --system\n" in err  # there is no --chat here


@pytest.fixture
def terminal(artifact: Path) -> Iterator[Terminal]:
    """A conversation on a terminal, whose answers are JSON: the model writes any characters."""
    with Terminal("chat", artifact, *SHORT, "--json", "--context", "512") as terminal:
        terminal.until("> ")
        yield terminal


def shown_answer(shown: str) -> dict[str, Any]:
    """The answer among what a terminal shows."""
    (answer,) = (json.loads(line) for line in shown.splitlines() if line.startswith("{"))
    return dict(answer)


UP, LEFT = "\x1b[A", "\x1b[D"


def test_terminal_edits_lines_and_brings_earlier_ones_back(terminal: Terminal) -> None:
    typed = {"one": "one", UP + LEFT * 2 + "X": "oXne", UP * 2: "one"}

    for keys, message in typed.items():
        assert shown_answer(terminal.enter(keys))["prompt"] == message
    terminal.type("\x04")
    assert terminal.end() == 0


def test_pasted_lines_are_one_message(terminal: Terminal) -> None:
    assert shown_answer(terminal.enter("\x1b[200~one\rtwo\x1b[201~"))["prompt"] == "one\ntwo"


def test_commands_tell_statistics_and_begin_anew(artifact: Path) -> None:
    with Terminal("chat", artifact, "--json") as terminal:
        terminal.until("> ")
        assert "there is no answer yet" in terminal.enter("/stats")
        first = shown_answer(terminal.enter("one"))
        assert f"{first['prompt_tokens']} prompt tokens, {first['new_tokens']} new at " in terminal.enter("/stats")
        full = terminal.enter("two")
        assert "leave no room in a cache of 64" in full
        assert "/clear begins a new conversation" in full
        terminal.enter("/clear")
        assert shown_answer(terminal.enter("one"))["completion"] == first["completion"]
        assert "no command '/what'" in terminal.enter("/what")
        shown = terminal.enter("/help")
        assert [name for name in COMMANDS if name not in shown] == []
        terminal.type("/exit\r")
        assert terminal.end() == 0


def test_ctrl_c_drops_a_line_and_ends_nothing(terminal: Terminal) -> None:
    terminal.type("half a line")
    terminal.until("half a line")
    time.sleep(0.5)  # a signal just before readline waits for the next key stays unheard until that comes
    terminal.type("\x03")
    assert "Ctrl-D or /exit ends the conversation" in terminal.until(PROMPT)
    assert shown_answer(terminal.enter("one"))["prompt"] == "one"


def test_results_of_a_terminal_go_to_a_file_alone(artifact: Path, tmp_path: Path) -> None:
    with Terminal("chat", artifact, *SHORT, stdout=tmp_path / "out.txt") as terminal:
        terminal.until("> ")
        terminal.enter("one")
        terminal.type("\x04")
        assert terminal.end() == 0
    assert (tmp_path / "out.txt").read_text() == completed(artifact, "<user>one\n<assistant>") + "\n"


@pytest.fixture
def ctrl_c(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Types `one` and `two`, and presses Ctrl-C so many times when the third piece of the first answer comes."""

    def pressed(times: int) -> None:
        stream, lines, pieces = Completer.stream, iter(["one", "two"]), itertools.count(1)

        def signalled(self: Completer, *arguments: Any) -> Iterator[str]:
            for piece in stream(self, *arguments):
                if piece and next(pieces) == 3:
                    for _ in range(times):
                        signal.raise_signal(signal.SIGINT)
                yield piece

        monkeypatch.setattr(Completer, "stream", signalled)
        monkeypatch.setattr("sys.stdin.isatty", lambda: True)
        monkeypatch.setattr("kvslim.cli.conversation.typed_lines", lambda: lines)

    return pressed


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(
    artifact: Path, ctrl_c: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    turns = "<user>one\n<assistant>"
    whole = completed(artifact, turns, 9)
    ctrl_c(1)
    assert app.run(["chat", str(artifact), "--json", "-n", "9", "--context", "512"]) == 0
    first, second = answers(capsys.readouterr().out)
    assert (first["finish_reason"], second["finish_reason"]) == ("interrupted", "length")
    assert 0 < len(first["completion"]) < len(whole)
    assert whole.startswith(first["completion"])
    assert first["new_tokens"] < 9 == second["new_tokens"]
    assert second["cached_tokens"] > len(turns)
    turns += f"{first['completion']}\n<user>two\n<assistant>"
    assert second["completion"] == completed(artifact, turns, 9)


def test_second_ctrl_c_ends_the_conversation(
    artifact: Path, ctrl_c: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    ctrl_c(2)
    assert app.run(["chat", str(artifact), "-n", "9"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
