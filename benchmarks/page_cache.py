"""What the system holds of files in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def drop(files: Sequence[Path]) -> None:
    """Asks the system to forget what it holds of files."""
    for file in files:
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
