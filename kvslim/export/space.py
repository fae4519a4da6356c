"""Whether disks have room for what is going to be written."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from kvslim.errors import OutputError


def check_space(needed_bytes: Mapping[Path, int]) -> None:
    """Fails early when a disk is too small for all that will lie on it at one time.

    Args:
        needed_bytes: What will be written into each folder, about; folders need not exist yet.

    Raises:
        OutputError: Naming the first folder on that disk.
    """
    disks: dict[int, list[Path]] = {}
    for folder in needed_bytes:
        disks.setdefault(_existing(folder).stat().st_dev, []).append(folder)
    for folders in disks.values():
        needed = sum(needed_bytes[folder] for folder in folders)
        free = shutil.disk_usage(_existing(folders[0])).free
        if free < needed:
            raise OutputError(
                f"not enough space: about {needed / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free",
                where=str(_existing(folders[0])),
                fix="free some space, or write to another disk: --out for artifacts, TMPDIR for what is temporary",
            )


def _existing(folder: Path) -> Path:
    folder = folder.expanduser().absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())
