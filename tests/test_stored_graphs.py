from __future__ import annotations

import os
import weakref
from pathlib import Path

import pytest
from support.models import open_prepared, recipe_of

from kvslim.export import stored
from kvslim.export.manifest import hash_files
from kvslim.export.stored import fetch_graph, graph_key, store_graph
from kvslim.prepared.decoder import PreparedDecoder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVSLIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "graphs"


def _graph(folder: Path, content: bytes = b"weights") -> Path:
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "model.onnx_data").write_bytes(content)
    return folder


def _fetched(key: str, folder: Path) -> dict[str, bytes] | None:
    folder.mkdir()
    found = fetch_graph(key, folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found or not files
    return files if found else None


def test_graph_comes_back_when_it_was_stored(tmp_path: Path) -> None:
    assert _fetched("key", tmp_path / "none") is None
    store_graph("key", _graph(tmp_path / "made"))
    assert _fetched("key", tmp_path / "found") == {"model.onnx": b"graph", "model.onnx_data": b"weights"}
    assert _fetched("other", tmp_path / "other") is None


@pytest.mark.parametrize("damage", ["changed", "cut", "missing", "added", "no digests", "bad digests"])
def test_graph_is_made_again_when_it_is_damaged(tmp_path: Path, cache: Path, damage: str) -> None:
    store_graph("key", _graph(tmp_path / "made"))
    data, digests = cache / "key" / "model.onnx_data", cache / "key" / "digests.json"
    data.unlink()
    contents = {"changed": b"weightz", "cut": b"weigh"}
    if damage != "missing":
        data.write_bytes(contents.get(damage, b"weights"))
    if damage == "added":
        (cache / "key" / "more").write_bytes(b"")
    if damage == "no digests":
        digests.unlink()
    if damage == "bad digests":
        digests.write_text("{")
    assert _fetched("key", tmp_path / "found") is None
    store_graph("key", _graph(tmp_path / "again"))
    assert _fetched("key", tmp_path / "now") is not None


def test_least_lately_used_graphs_go_when_the_limit_is_passed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvslim.calibrate.cache.LIMIT", 6_000)
    for age, key in enumerate(("third", "second", "first")):
        store_graph(key, _graph(tmp_path / key, bytes(1_500)))
        os.utime(cache / key, (1_000 + age, 1_000 + age))
    assert _fetched("third", tmp_path / "used") is not None
    store_graph("new", _graph(tmp_path / "new", bytes(1_500)))
    assert {path.name for path in cache.iterdir()} == {"third", "first", "new"}


def test_graph_is_not_stored_when_it_exceeds_the_limit(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvslim.calibrate.cache.LIMIT", 1_000)
    store_graph("key", _graph(tmp_path / "made", bytes(1_500)))
    assert not cache.exists()


def test_nothing_fails_when_the_cache_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("KVSLIM_CACHE", str(tmp_path / "file" / "cache"))
    store_graph("key", _graph(tmp_path / "made"))
    assert _fetched("key", tmp_path / "found") is None


def test_key_changes_when_a_version_or_a_part_does(monkeypatch: pytest.MonkeyPatch) -> None:
    key = graph_key("model", {"type": "fp32"})
    assert key == graph_key("model", {"type": "fp32"})
    assert key != graph_key("model", {"type": "int8"})
    monkeypatch.setattr(stored, "version", lambda name: "0" if name == "onnx" else "1")
    assert key != graph_key("model", {"type": "fp32"})


def test_plain_export_is_built_once_and_lets_the_model_go_when_it_is_stored(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    build = PreparedDecoder.build_plain

    def noting(prepared: PreparedDecoder, folder: Path) -> None:
        built.append(folder)
        build(prepared, folder)

    monkeypatch.setattr(PreparedDecoder, "build_plain", noting)
    prepared = open_prepared(tiny_llama, recipe_of())
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        prepared.export_plain(folder)
    assert built == folders[:1]
    assert hash_files(folders[0]) == hash_files(folders[1])
    module = weakref.ref(prepared.model.model)
    prepared.release()
    assert module() is None
