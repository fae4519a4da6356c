"""One file with an artifact and all that runs it on a machine without a network."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from pydantic import Field

from kvslim.bundle.wheels import check_platform, download, write_own_wheel
from kvslim.contract import Frozen
from kvslim.errors import ArtifactError, OutputError, UsageError
from kvslim.export.manifest import verify
from kvslim.progress import Progress, Silent
from kvslim.replacing import replacing
from kvslim.runtime.text import read_decoder

SUFFIX = ".tar.gz"
SUMS = "SHA256SUMS"


class Bundle(Frozen):
    """What a bundle is for, and what is in it."""

    file: str
    bytes: int
    sha256: str = Field(description="of the file")
    platform: str
    python: str
    wheels: tuple[str, ...] = Field(description="file names")


def write_bundle(artifact: Path, out: Path, platform: str, python: str, progress: Progress | None = None) -> Bundle:
    """Writes the artifact, the wheels of the small install, digests, and a script `run` into one file.

    The same artifact and wheels give the same bytes. A file that is there is replaced when the new one is whole.

    Args:
        artifact: A folder that `kvslim compress` wrote.
        out: The file to write.
        platform: One of `PLATFORMS`.
        python: Version of Python there, such as `3.11`.
        progress: Receives the progress.

    Raises:
        UsageError: The file's name does not end with `.tar.gz`, or it would lie in the artifact.
        NotFoundError: There is no artifact, or no wheel of a package for that machine.
        ArtifactError: The artifact is broken or changed.
        UnsupportedError: It is an encoder, or there is no such platform or version of Python.
        OutputError: The file cannot be written.
    """
    progress = progress or Silent()
    _check(artifact, out, platform, python)
    with replacing(out) as partial, tempfile.TemporaryDirectory(prefix="kvslim-") as folder:
        with _output_errors(out):
            partial.touch()  # what cannot be written is told before the download
        progress.stage("download wheels with pip")
        wheels = Path(folder)
        write_own_wheel(wheels)
        download(wheels, platform, python)
        progress.stage("pack")
        found = {wheel.name: wheel for wheel in wheels.iterdir()}
        files: dict[str, Path | bytes] = {
            f"artifact/{path.relative_to(artifact).as_posix()}": path for path in artifact.rglob("*") if path.is_file()
        }
        files |= {f"{'pip' if name.startswith('pip-') else 'wheels'}/{name}": path for name, path in found.items()}
        files["run"] = _script(platform, python)
        files[SUMS] = "".join(f"{_sha256(files[name])}  {name}\n" for name in sorted(files)).encode()
        with _output_errors(out):
            _write(partial, out.name.removesuffix(SUFFIX), files)
    return Bundle(
        file=str(out),
        bytes=out.stat().st_size,
        sha256=_sha256(out),
        platform=platform,
        python=python,
        wheels=tuple(sorted(found)),
    )


def _check(artifact: Path, out: Path, platform: str, python: str) -> None:
    """Refuses what cannot be bundled, before anything is downloaded."""
    if not out.name.endswith(SUFFIX) or out.name == SUFFIX:
        name = "bundle" if out.name == SUFFIX else out.stem
        raise UsageError(f"{out.name!r} is not called FILE{SUFFIX}", where="--out", fix=f"write -o {name}{SUFFIX}")
    check_platform(platform, python)
    read_decoder(artifact, None, option="context")
    if problems := verify(artifact):
        raise ArtifactError("; ".join(problems), where=str(artifact), fix="compress or download it again")
    if out.resolve().is_relative_to(artifact.resolve()):
        raise UsageError("the bundle would lie in the artifact", where="--out", fix="name a file outside of its folder")


def _script(platform: str, python: str) -> bytes:
    text = (resources.files("kvslim.bundle") / "run.sh").read_text(encoding="utf-8")
    return text.replace("@PYTHON@", python).replace("@MACHINE@", platform.removeprefix("linux-")).encode()


def _sha256(content: Path | bytes) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _output_errors(out: Path) -> Iterator[None]:
    """Turns the system's refusals to write into an `OutputError`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write: {error.strerror}", where=str(out), fix="give another --out") from error


def _write(file: Path, root: str, files: Mapping[str, Path | bytes]) -> None:
    """Writes files into one folder of an archive."""
    with (
        file.open("wb") as raw,
        gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name, content in sorted(files.items()):
            _add(archive, f"{root}/{name}", content)


def _add(archive: tarfile.TarFile, name: str, content: Path | bytes) -> None:
    """Adds a file as whoever unpacks it owns it, and without the time at which it was written here."""
    entry = tarfile.TarInfo(name)
    entry.mode = 0o755 if name.endswith("/run") else 0o644
    if isinstance(content, bytes):
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
        return
    entry.size = content.stat().st_size
    with content.open("rb") as file:
        archive.addfile(entry, file)
