"""Headless Chromium, kept from the network and from the user's profile."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

QUIET = (
    "--headless",
    "--no-sandbox",  # root has no sandbox, and the pages are our own
    "--disable-gpu",
    "--disable-dev-shm-usage",  # a container has little shared memory
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def find() -> str | None:
    """The browser's path, where Debian's `chromium` is installed."""
    return shutil.which("chromium")


def browse(chromium: str, page: Path, window: tuple[int, int], *options: str) -> str:
    """Opens a local page in a window of that size and returns what Chromium prints."""
    with tempfile.TemporaryDirectory(prefix="kvslim-chromium-", ignore_cleanup_errors=True) as profile:
        size = f"--window-size={window[0]},{window[1]}"
        command = [chromium, *QUIET, f"--user-data-dir={profile}", size, *options, page.resolve().as_uri()]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
