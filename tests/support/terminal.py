"""A command on a terminal of its own: what is typed, and what it shows."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

from support.paths import ROOT

PATIENCE = 60.0  # seconds
SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
PROMPT = "\n> "


class Terminal:
    """`kvslim` with these arguments, on a terminal.

    Attributes:
        process: The command.
        shown: All that the terminal has shown, without the sequences that move the cursor.

    Args:
        arguments: The command line without the program's name.
        stdout: Where its results go in place of the terminal.
    """

    def __init__(self, *arguments: object, stdout: Path | None = None) -> None:
        self._keys, inner = pty.openpty()
        self._raw, self._seen = b"", 0
        command = [sys.executable, "-m", "kvslim.cli.app", *map(str, arguments)]
        result = stdout.open("wb") if stdout else None
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=inner,
            stdout=result or inner,
            stderr=inner,
            env={**os.environ, "TERM": "xterm"},
            preexec_fn=_own_terminal,
        )
        os.close(inner)
        if result:
            result.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._keys)

    @property
    def shown(self) -> str:
        return SEQUENCE.sub("", self._raw.decode(errors="replace")).replace("\r", "")

    def type(self, keys: str) -> None:
        """Presses keys."""
        os.write(self._keys, keys.encode())

    def until(self, text: str) -> str:
        """Waits for a text behind what was waited for before; gives what was shown in between."""
        end = time.monotonic() + PATIENCE
        while (place := self.shown.find(text, self._seen)) < 0:
            assert time.monotonic() < end, f"no {text!r} in {self.shown[self._seen :]!r}"
            self._read()
        between = self.shown[self._seen : place]
        self._seen = place + len(text)
        return between

    def enter(self, line: str) -> str:
        """Types a line; gives what is shown from it to the next prompt."""
        self.type(line + "\r")
        return self.until(PROMPT)

    def end(self) -> int:
        """Waits for the command to end; gives its exit code."""
        end = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            assert time.monotonic() < end, f"still running: {self.shown[self._seen :]!r}"
            self._read()
        self._read()
        return self.process.returncode

    def _read(self) -> None:
        if select.select([self._keys], [], [], 0.1)[0]:
            try:
                self._raw += os.read(self._keys, 65536)
            except OSError:  # the command has closed its end
                time.sleep(0.05)


def _own_terminal() -> None:
    """Makes stdin the terminal that sends signals to the new process."""
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
