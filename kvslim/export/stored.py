"""Graphs on disk by the hash of everything that decides them, so that a later run need not export them again."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kvslim.calibrate import cache
from kvslim.export.manifest import hash_files

KIND = "graphs"
DIGESTS = "digests.json"
VERSIONED = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")


def graph_key(*parts: Any) -> str:
    """SHA-256 of JSON-able parts, the libraries that export, and KVSlim's own code."""
    return cache.content_key("graph", *parts, {name: version(name) for name in VERSIONED}, _own_code())


def fetch_graph(key: str, folder: Path) -> bool:
    """Puts the files of a stored graph into a folder; False where there is none, or it is damaged and now gone."""
    stored = _graphs() / key
    names = _whole_files(stored)
    if not names:
        shutil.rmtree(stored, ignore_errors=True)
        return False
    cache.used(stored)
    try:
        for name in names:
            _link(stored / name, folder / name)
    except OSError:
        return False
    return True


def _whole_files(stored: Path) -> list[str]:
    """The files of a stored graph; none where one of them is not what was stored."""
    try:
        digests: dict[str, str] = json.loads((stored / DIGESTS).read_bytes())
        found = hash_files(stored)
    except (OSError, ValueError):
        return []
    del found[DIGESTS]
    return list(digests) if found == digests else []


def store_graph(key: str, folder: Path) -> None:
    """Stores the files of a folder, whole or not at all; a cache that cannot be written is no reason to fail."""
    if cache.size_of(folder) > cache.LIMIT:
        return
    partial = None
    try:
        _graphs().mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=_graphs(), suffix=".partial"))
        digests = hash_files(folder)
        for name in digests:
            _link(folder / name, partial / name)
        (partial / DIGESTS).write_text(json.dumps(digests), encoding="utf-8")
        partial.rename(_graphs() / key)
        cache.evict(KIND)
    except OSError:
        pass
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _graphs() -> Path:
    return cache.cache_folder() / KIND


def _link(source: Path, target: Path) -> None:
    """One file under a second name, or a copy where the two are on different file systems."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _own_code() -> str:
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
