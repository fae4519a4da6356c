"""Wheels of what is installed, put together from their files, so that tests need no package index."""

from __future__ import annotations

import zipfile
from importlib import metadata
from pathlib import Path


def write_wheel(name: str, folder: Path) -> Path:
    """The wheel that a package was installed from, without the scripts that pip made."""
    package = metadata.distribution(name)
    tags = [line.partition(": ")[2] for line in (package.read_text("WHEEL") or "").splitlines() if "Tag: " in line]
    parts = zip(*(tag.split("-") for tag in tags), strict=True)  # Python, ABI and platform
    tag = "-".join(".".join(dict.fromkeys(part)) for part in parts)
    path = folder / f"{package.name.replace('-', '_')}-{package.version}-{tag}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as wheel:
        for file in package.files or ():
            if file.parts[0] != ".." and file.suffix != ".pyc" and file.name not in {"INSTALLER", "REQUESTED"}:
                wheel.write(str(file.locate()), file.as_posix())
    return path
