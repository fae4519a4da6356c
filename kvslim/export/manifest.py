"""`kvslim.json`, and the digests in it that guard every file of an artifact, itself included."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from packaging.version import Version
from pydantic import ValidationError

from kvslim.errors import ArtifactError, NotFoundError, UnsupportedError, fault_of
from kvslim.types import KVLayout, Manifest

MANIFEST = "kvslim.json"
# The oldest that was tried: every kind of artifact gives the same tokens in 1.27.0 and in 1.31.1. Older ones know no
# integer caches on CPUs, and their error does not say so.
LEAST_ONNXRUNTIME = "1.27"
GRAPH, WEIGHTS = "model.onnx", "model.onnx_data"
SPECULATIVE_GRAPH = "speculative.onnx"  # the same for speculative decoding, where an artifact has a draft
DIGEST = "sha256"  # the last key of the file: SHA-256 of all that stands before it


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `kvslim.json`; the same manifest gives the same bytes."""
    (folder / MANIFEST).write_text(_serialise(manifest), encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact.

    Raises:
        NotFoundError: There is no such folder, or it holds no manifest.
        ArtifactError: The manifest is broken, or of a format that this version does not read.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise NotFoundError("no such artifact", where=str(folder), fix="give a folder that `kvslim compress` wrote")
    if not path.is_file():
        raise NotFoundError(f"no {MANIFEST}", where=str(folder), fix="give a folder that `kvslim compress` wrote")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{MANIFEST} is not JSON: {error}", where=str(path), fix="compress again") from error
    return _parse(data, path)


def read_runnable(folder: Path) -> Manifest:
    """The manifest of an artifact whose graph this onnxruntime is new enough for.

    Raises:
        NotFoundError, ArtifactError: As `read_manifest`.
        UnsupportedError: The graph needs a newer version, which would otherwise be told by an error without a reason.
    """
    import onnxruntime

    manifest, found = read_manifest(folder), onnxruntime.__version__
    least = manifest.least_onnxruntime
    if least is not None and Version(found).release < Version(least).release:
        raise UnsupportedError(
            f"the artifact needs onnxruntime {least} or newer, this is {found}",
            where=str(folder),
            fix=f"pip install 'onnxruntime>={least}'",
        )
    return manifest


def read_whole(folder: Path) -> Manifest:
    """The manifest of an artifact that has all graphs that it should have, before any of them is measured.

    Raises:
        KvslimError: As `read_runnable`.
        NotFoundError: A graph is missing.
    """
    manifest = read_runnable(folder)
    for name in (GRAPH, *((SPECULATIVE_GRAPH,) if manifest.draft else ())):
        if not (folder / name).is_file():
            raise NotFoundError(f"the artifact lacks {name}", where=str(folder / name), fix="compress again")
    return manifest


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder` but the manifest, by relative name with forward slashes."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: _sha256(folder / name) for name in names if name != MANIFEST}


def verify(folder: Path) -> tuple[str, ...]:
    """Every way in which an artifact differs from what was written, one line each; none when it is whole.

    Raises:
        NotFoundError: There is no such artifact.
        ArtifactError: Its manifest cannot be read.
    """
    manifest = read_manifest(folder)
    found = hash_files(folder)
    problems = list(_manifest_problems(folder, manifest))
    for name in sorted({*manifest.files, *found, *_no_files(folder)}):
        if name not in manifest.files:
            problems.append(f"{name}: not part of this artifact")
        elif name not in found:
            problems.append(f"{name}: missing")
        elif found[name] != manifest.files[name]:
            problems.append(f"{name}: changed")
        elif _leads_away(folder, name):
            problems.append(f"{name}: a link out of the folder, where onnxruntime reads no weights")
    return tuple(problems)


def _leads_away(folder: Path, name: str) -> bool:
    """Whether a file of weights lies neither in the folder nor where the graph does, as in a hub cache."""
    places = (folder.resolve(), (folder / GRAPH).resolve().parent)
    return name == WEIGHTS and not any((folder / name).resolve().is_relative_to(place) for place in places)


def _no_files(folder: Path) -> set[str]:
    """What else lies below `folder`: empty folders, links to folders or to nothing, pipes."""
    paths = (path for path in folder.rglob("*") if not path.is_file())
    return {
        path.relative_to(folder).as_posix()
        for path in paths
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir())
    }


def _parse(data: Any, path: Path) -> Manifest:
    written = data.get("format") if isinstance(data, dict) else None
    if isinstance(written, int) and written > 1:
        raise ArtifactError(f"format {written} is newer than this KVSlim reads", where=str(path), fix="update KVSlim")
    if isinstance(data, dict):
        data = {key: value for key, value in data.items() if key != DIGEST}
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        message = f"{MANIFEST}: {fault_of(error.errors()[0], 'manifest')}"
        raise ArtifactError(message, where=str(path), fix="compress again") from error


def _manifest_problems(folder: Path, manifest: Manifest) -> list[str]:
    problems = []
    if not _is_as_written((folder / MANIFEST).read_bytes()):
        problems.append(f"{MANIFEST}: changed")
    if manifest.kv_layout != KVLayout.of(manifest.spec, manifest.plan):
        problems.append(f"{MANIFEST}: kv_layout does not follow from the plan")
    if manifest.report is not None and manifest.passed != manifest.report.passed:
        problems.append(f"{MANIFEST}: passed differs from the report")
    return problems


def _serialise(manifest: Manifest) -> str:
    return _with_digest(manifest.model_dump_json(indent=2).removesuffix("\n}"))


def _with_digest(text: str) -> str:
    return f'{text},\n  "{DIGEST}": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'


def _is_as_written(manifest: bytes) -> bool:
    """Whether a manifest's digest is that of its text, whatever version wrote it."""
    text = manifest.decode(errors="replace")
    return text == _with_digest(text.rpartition(f',\n  "{DIGEST}": ')[0])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
