"""Lines that a user types or a pipe brings, and Ctrl-C: heard always, and where asked for, only between two tokens."""

from __future__ import annotations

import _thread
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from threading import Event, Timer
from typing import TYPE_CHECKING

from kvslim.cli import console

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

PROMPT = "> "
AGAIN = 0.01  # s; by then the callback that a signal fell into is over


def piped_lines() -> Iterator[str]:
    """The lines of stdin that are not blank."""
    for line in sys.stdin:
        if line.strip():
            yield line.rstrip("\r\n")


def typed_lines() -> Iterator[str]:
    """The lines that are typed on a terminal, edited with arrow keys and a history, until Ctrl-D; Ctrl-C drops one."""
    # Pythons are built without it, or with another library that does not know the setting.
    with contextlib.suppress(ImportError):
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one message
    while True:
        try:
            line = _typed_line()
        except EOFError:
            console.hint("")
            return
        except KeyboardInterrupt:
            console.hint("\nhint: Ctrl-D or /exit ends the conversation")
            continue
        if line.strip():
            yield line


def _typed_line() -> str:
    """The next line. The editor of lines draws on stdout, so the prompt sign must not be part of a result there."""
    if sys.stdout.isatty():
        return input(PROMPT)
    console.mark(PROMPT)
    if line := sys.stdin.readline():
        return line.rstrip("\r\n")
    raise EOFError


def hear_every_interrupt() -> None:
    """Sends Ctrl-C again where it fell into a finalizer: Python prints and drops what is raised in one."""
    others = sys.unraisablehook

    def dropped(raised: UnraisableHookArgs) -> None:
        if issubclass(raised.exc_type, KeyboardInterrupt):
            again = Timer(AGAIN, _thread.interrupt_main)
            again.daemon = True
            again.start()
        else:
            others(raised)

    sys.unraisablehook = dropped


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Notes the first Ctrl-C in place of raising it, so that no run of a graph is cut in two; the second one raises."""
    pressed = Event()

    def note(*_: object) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
