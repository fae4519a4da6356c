"""Folders whose files are links, as the hub's cache lays them out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.tiny_artifact import describe
from support.tiny_gguf import write_gguf
from support.tiny_graph import write_last_only

from kvslim.errors import ArtifactError, ModelError, NotFoundError
from kvslim.export.manifest import verify
from kvslim.loading.source import read_spec, resolve
from kvslim.runtime.session import DecodeSession

Layout = Callable[[Path, Path], Path]


def blobs(source: Path, root: Path) -> Path:
    """As the hub's cache: each file a relative link to one without a suffix, in another folder."""
    store, folder = root / "blobs", root / "snapshots" / "0a1b"
    folder.mkdir(parents=True)
    store.mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.copy(path, store / f"{number:040x}")
        (folder / path.name).symlink_to(Path("../../blobs", f"{number:040x}"))
    return folder


def store_paths(source: Path, root: Path) -> Path:
    """As package managers that keep files by content: links to links, by absolute paths."""
    folder, between = root / "profile", root / "between"
    folder.mkdir()
    between.mkdir()
    for path in source.iterdir():
        (between / path.name).symlink_to(path)
        (folder / path.name).symlink_to(between / path.name)
    return folder


def folder_link(source: Path, root: Path) -> Path:
    """A link to the whole folder."""
    (root / "latest").symlink_to(source, target_is_directory=True)
    return root / "latest"


def graph_away(source: Path, root: Path) -> Path:
    """The graph is a link, its data file is beside the link."""
    folder = Path(shutil.copytree(source, root / "artifact"))
    (folder / "model.onnx").rename(root / "elsewhere.onnx")
    (folder / "model.onnx").symlink_to(root / "elsewhere.onnx")
    return folder


def data_renamed(source: Path, root: Path) -> Path:
    """The data file is a link to another name in the same folder."""
    folder = Path(shutil.copytree(source, root / "artifact"))
    (folder / "model.onnx_data").rename(folder / "weights.bin")
    (folder / "model.onnx_data").symlink_to("weights.bin")
    return folder


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph with its weights in a data file beside it."""
    folder = tmp_path_factory.mktemp("links") / "artifact"
    folder.mkdir()
    model = onnx.load(write_last_only(folder / "model.onnx"))
    (folder / "model.onnx").unlink()
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx_data", size_threshold=64)
    describe(folder)
    return folder


def logits(folder: Path, all_positions: bool) -> np.ndarray:
    """Logits of the last of three tokens, or of all."""
    session = DecodeSession(folder, capacity=3, threads=1, all_positions=all_positions)
    found: np.ndarray = session.step([3, 1, 4])
    assert len(found) == (3 if all_positions else 1)
    return found


@pytest.mark.parametrize("all_positions", [False, True], ids=["generate", "validate"])
@pytest.mark.parametrize("layout", [blobs, store_paths, folder_link, graph_away, data_renamed])
def test_artifact_of_links_computes_what_the_artifact_does(
    artifact: Path, tmp_path: Path, layout: Layout, all_positions: bool
) -> None:
    found = logits(layout(artifact, tmp_path), all_positions)
    np.testing.assert_array_equal(found, logits(artifact, all_positions))


def test_artifact_of_links_is_whole(artifact: Path, tmp_path: Path) -> None:
    assert verify(blobs(artifact, tmp_path)) == ()


@pytest.mark.parametrize("all_positions", [False, True], ids=["generate", "validate"])
def test_data_file_alone_in_another_folder_is_refused_and_named(
    artifact: Path, tmp_path: Path, all_positions: bool
) -> None:
    folder = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    (folder / "model.onnx_data").rename(tmp_path / "model.onnx_data")
    (folder / "model.onnx_data").symlink_to("../model.onnx_data")
    with pytest.raises(ArtifactError, match="escapes model directory") as error:
        DecodeSession(folder, capacity=4, all_positions=all_positions)
    assert "kvslim verify" in error.value.fix
    assert verify(folder) == ("model.onnx_data: a link out of the folder, where onnxruntime reads no weights",)


@pytest.mark.parametrize("layout", [blobs, store_paths, folder_link])
def test_model_of_links_is_the_model(tiny_llama: Path, tmp_path: Path, layout: Layout) -> None:
    linked, whole = resolve(str(layout(tiny_llama, tmp_path))), resolve(str(tiny_llama))
    linked.check()
    assert linked.sha256 == whole.sha256
    assert linked.stored_bytes == whole.stored_bytes == (tiny_llama / "model.safetensors").stat().st_size
    assert linked.tensors().keys() == whole.tensors().keys()
    assert linked.tokenizer().get_vocab() == whole.tokenizer().get_vocab()


def test_gguf_that_is_a_link_to_a_blob_is_read(tiny_llama: Path, tmp_path: Path) -> None:
    blob = write_gguf(tiny_llama, tmp_path / "blob.gguf").rename(tmp_path / ("0" * 64))
    (tmp_path / "model.gguf").symlink_to(blob.name)
    assert read_spec(resolve(str(tmp_path / "model.gguf"))).layers == 2


def test_links_to_files_that_are_gone_are_missing_files(tiny_llama: Path, tmp_path: Path) -> None:
    folder = blobs(tiny_llama, tmp_path)
    (folder / "model.safetensors").resolve().unlink()
    with pytest.raises(NotFoundError, match=r"no model\.safetensors"):
        resolve(str(folder)).check()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = '{"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}'
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"which is not a \.safetensors file"):
        resolve(str(folder)).check()
