"""Prints what the small install takes on disk, on each platform that bundles are made for; downloads its wheels."""

from __future__ import annotations

import platform
import tempfile
import zipfile
from pathlib import Path

from kvslim.bundle.wheels import PLATFORMS, download, write_own_wheel

SHOWN = 5
MIB = 2**20


def sizes(target: str) -> dict[str, float]:
    """MiB of the unpacked files of each package; pip, which installs them, is not one."""
    major, minor, _ = platform.python_version_tuple()
    with tempfile.TemporaryDirectory() as folder:
        download(Path(folder), target, f"{major}.{minor}")
        write_own_wheel(Path(folder))
        return {
            wheel.name.partition("-")[0]: sum(entry.file_size for entry in zipfile.ZipFile(wheel).infolist()) / MIB
            for wheel in Path(folder).glob("*.whl")
            if not wheel.name.startswith("pip-")
        }


def main() -> None:
    found = [sizes(target) for target in PLATFORMS]
    largest = sorted(found[0], key=lambda name: -found[0][name])[:SHOWN]
    print(f"| MiB, Python {platform.python_version()} | {' | '.join(PLATFORMS)} |\n| ---{' | ---:' * len(found)} |")
    for name in largest:
        print(f"| {name} | {' | '.join(f'{one[name]:.1f}' for one in found)} |")
    rest = [sum(size for name, size in one.items() if name not in largest) for one in found]
    print(f"| {len(found[0]) - SHOWN} others | {' | '.join(f'{size:.1f}' for size in rest)} |")
    print(f"| all | {' | '.join(f'{sum(one.values()):.1f}' for one in found)} |")


if __name__ == "__main__":
    main()
