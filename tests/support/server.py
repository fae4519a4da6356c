"""`kvslim serve` as a process of its own, and OpenAI's client for it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Self

import psutil
from openai import AsyncOpenAI, OpenAI

from support.paths import ROOT

PATIENCE = 60  # seconds


class Server:
    """A server of an artifact, ended at the end of a `with` block if it has not ended by then.

    Attributes:
        process: The process.
        url: The base URL that it prints.

    Args:
        artifact: The folder.
        errors: The file that stderr goes to.
        options: More of the command line.
    """

    def __init__(self, artifact: Path, errors: Path, *options: object) -> None:
        command = [sys.executable, "-m", "kvslim.cli.app", "serve", artifact, "--port", "0", *options]
        self._errors = errors
        with errors.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.fullmatch(r"serving (\S+) at (\S+)\n", line)
        assert found, (line, self.errors)
        self.name, self.url = found.groups()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    @property
    def errors(self) -> str:
        """What it has printed on stderr."""
        return self._errors.read_text()

    @property
    def memory(self) -> int:
        """Resident bytes."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def client(self) -> OpenAI:
        """OpenAI's client, which tries nothing twice."""
        return OpenAI(base_url=self.url, api_key="any", max_retries=0, timeout=PATIENCE)

    def async_client(self) -> AsyncOpenAI:
        """The same for many requests at once."""
        return AsyncOpenAI(base_url=self.url, api_key="any", max_retries=0, timeout=PATIENCE)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Asks it to stop."""
        self.process.send_signal(number)

    def end(self) -> int:
        """Waits for its end; gives the exit code."""
        return self.process.wait(PATIENCE)
