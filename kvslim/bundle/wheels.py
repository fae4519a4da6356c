"""The wheels of the small install for a platform: those of the package index, and KVSlim's own."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from importlib import metadata, resources
from pathlib import Path

from kvslim.errors import NotFoundError, UnsupportedError, suggestion
from kvslim.packages import small_install
from kvslim.recipe import shipped_recipes

# glibc 2.28 is that of Debian 10 and newer.
TAGS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_26", "manylinux_2_24", "manylinux_2_17", "manylinux2014")
PLATFORMS = ("linux-aarch64", "linux-x86_64")
EPOCH = (1980, 1, 1, 0, 0, 0)  # the first time that a zip file can tell
FAULT = "ERROR: "  # what a line of pip's begins with
WHEEL = "Wheel-Version: 1.0\nGenerator: kvslim\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def check_platform(platform: str, python: str) -> None:
    """Refuses what no wheels can be asked for.

    Raises:
        UnsupportedError: The platform is not known, or the version of Python is none, or too old.
    """
    if platform not in PLATFORMS:
        message = f"no bundle can be made for {platform!r}"
        raise UnsupportedError(message, where="--platform", fix=suggestion(platform, PLATFORMS))
    version = re.fullmatch(r"3\.(\d{1,2})", python)
    if version is None or int(version[1]) < 11:
        message = f"{python!r} is not a version of Python that KVSlim runs on"
        raise UnsupportedError(message, where="--python", fix="write 3.11, or the first two numbers of a newer one")


def download(folder: Path, platform: str, python: str) -> None:
    """Fetches the wheels of the small install into a new folder, and pip's, which a bare system lacks.

    pip finds them as it is configured on this machine: an index, or folders of wheels.

    Args:
        folder: Where they go.
        platform: One of `PLATFORMS`.
        python: Version of Python that they are for, such as `3.11`.

    Raises:
        NotFoundError: pip is missing, or finds no wheel of one of them.
    """
    machine = platform.removeprefix("linux-")
    options = ["--no-deps", "--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    options += [part for tag in TAGS for part in ("--platform", f"{tag}_{machine}")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    done = subprocess.run([*command, *options, *small_install(), *_pip()], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.splitlines()
        reasons = [line.removeprefix(FAULT) for line in lines if line.startswith(FAULT)] or lines
        raise NotFoundError(
            f"no wheels for {platform}, Python {python}: {reasons[-1] if reasons else 'pip failed'}",
            where="pip download",
            fix="check the network and pip's configuration (pip config list), or take another --python",
        )


def _pip() -> list[str]:
    try:
        return [f"pip=={metadata.version('pip')}"]
    except metadata.PackageNotFoundError as error:
        message = "wheels are downloaded with pip, which is not installed"
        raise NotFoundError(message, where=sys.executable, fix="python -m ensurepip") from error


def write_own_wheel(folder: Path) -> Path:
    """The wheel of this KVSlim, from its installed files or its checkout; the same files give the same bytes.

    Args:
        folder: Where it goes.

    Raises:
        NotFoundError: KVSlim runs from files that were never installed.
    """
    try:
        installed = metadata.distribution("kvslim")
    except metadata.PackageNotFoundError as error:
        raise NotFoundError("kvslim is not installed", where=sys.executable, fix="pip install .") from error
    about = f"kvslim-{installed.version}.dist-info"
    files = dict(_package_files())
    files |= {
        f"{about}/METADATA": (installed.read_text("METADATA") or installed.read_text("PKG-INFO") or "").encode(),
        f"{about}/entry_points.txt": (installed.read_text("entry_points.txt") or "").encode(),
        f"{about}/WHEEL": WHEEL.encode(),
    }
    wheel = folder / f"kvslim-{installed.version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in sorted(files.items()):
            _add(archive, name, content)
        _add(archive, f"{about}/RECORD", _record(files, f"{about}/RECORD"))
    return wheel


def _package_files() -> Iterator[tuple[str, bytes]]:
    """The files of the package by their path in a wheel; in a checkout its recipes lie elsewhere."""
    root = Path(str(resources.files("kvslim")))
    for path in root.rglob("*"):
        if path.is_file() and path.parent.name != "__pycache__":
            yield f"kvslim/{path.relative_to(root).as_posix()}", path.read_bytes()
    for path in shipped_recipes().values():
        yield f"kvslim/recipes/{path.name}", path.read_bytes()


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name, EPOCH)
    entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
    archive.writestr(entry, content)


def _record(files: Mapping[str, bytes], own: str) -> bytes:
    """The list of files that a wheel must have, with SHA-256 and size."""
    lines = []
    for name, content in sorted(files.items()):
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(content)}\n")
    return "".join([*lines, f"{own},,\n"]).encode()
