"""A manifest tells of every changed byte, and which onnxruntime runs the graph."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from support.tiny_artifact import fill

from kvslim.cli import app
from kvslim.errors import ArtifactError, NotFoundError, UnsupportedError
from kvslim.export.manifest import (
    LEAST_ONNXRUNTIME,
    MANIFEST,
    read_manifest,
    read_runnable,
    verify,
    write_manifest,
)
from kvslim.export.package import staging
from kvslim.report.card import model_card


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    with staging(tmp_path / "artifact") as folder:
        fill(folder)
    return tmp_path / "artifact"


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx_data"])
def test_verify_names_the_file_when_any_byte_is_flipped(artifact: Path, name: str) -> None:
    whole = (artifact / name).read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        (artifact / name).write_bytes(flipped)
        assert verify(artifact) == (f"{name}: changed",)


def test_verify_names_missing_and_extra_files(artifact: Path) -> None:
    (artifact / "model.onnx").unlink()
    (artifact / "more").mkdir()
    (artifact / "more" / "extra.bin").write_bytes(b"1")
    (artifact / "empty").mkdir()
    (artifact / "link").symlink_to(artifact.parent)
    (artifact / "nowhere").symlink_to(artifact / "gone")
    assert verify(artifact) == (
        "empty: not part of this artifact",
        "link: not part of this artifact",
        "model.onnx: missing",
        "more/extra.bin: not part of this artifact",
        "nowhere: not part of this artifact",
    )


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"rank": 8', '"rank": 16', "kv_layout does not follow"),
        ('  "format": 1', ' "format": 1', "kvslim.json: changed"),
        ('"passed": null', '"passed":  null', "kvslim.json: changed"),
        ('"model": "demo"', '"model": "demi"', "kvslim.json: changed"),
        ('"context": 64', '"context": 65', "kvslim.json: changed"),
        ('"sha256": "0000', '"sha256": "0001', "kvslim.json: changed"),
    ],
)
def test_verify_names_the_manifest_when_it_was_edited(artifact: Path, old: str, new: str, problem: str) -> None:
    text = (artifact / MANIFEST).read_text()
    assert old in text
    (artifact / MANIFEST).write_text(text.replace(old, new, 1))
    assert any(problem in line for line in verify(artifact))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ('{"format": 1', "not JSON"),
        ('{"format": 2}', "format 2 is newer"),
        ('{"format": 1}', "source"),
        ("[]", "manifest: must be keys with values"),
        ('{"format": 1, "surprise": 0}', "kvslim.json"),
    ],
)
def test_read_manifest_refuses_when_it_is_broken(artifact: Path, text: str, message: str) -> None:
    (artifact / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match=message):
        read_manifest(artifact)


def test_read_manifest_refuses_a_tensor_of_an_unknown_cache(artifact: Path) -> None:
    text = (artifact / MANIFEST).read_text()
    (artifact / MANIFEST).write_text(text.replace('"cache": "full"', '"cache": "ful"', 1))
    with pytest.raises(ArtifactError, match=r"kv_layout.tensors.0: .*unknown kind of cache 'ful'"):
        read_manifest(artifact)


def test_read_manifest_refuses_when_it_is_not_text(artifact: Path) -> None:
    (artifact / MANIFEST).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError, match="not JSON"):
        read_manifest(artifact)


def test_read_manifest_says_not_found_when_there_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such artifact"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(NotFoundError, match=MANIFEST):
        read_manifest(tmp_path)


def test_manifest_keeps_its_bytes_when_read_and_written_again(artifact: Path) -> None:
    before = (artifact / MANIFEST).read_bytes()
    write_manifest(artifact, read_manifest(artifact))
    assert (artifact / MANIFEST).read_bytes() == before


@pytest.mark.parametrize(
    ("installed", "least", "runs"),
    [
        ("1.26.0", "1.27", False),
        ("1.9.1", "1.27", False),
        ("1.27.0", "1.27", True),
        ("1.27.0.dev20260601", "1.27", True),
        ("2.0.0", "1.27", True),
        ("1.26.0", None, True),
        ("1.31.1", "1.40.2", False),
    ],
)
def test_artifact_is_refused_by_an_onnxruntime_that_is_too_old(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, installed: str, least: str | None, runs: bool
) -> None:
    write_manifest(artifact, read_manifest(artifact).model_copy(update={"least_onnxruntime": least}))
    monkeypatch.setattr("onnxruntime.__version__", installed)
    if runs:
        assert read_runnable(artifact).least_onnxruntime == least
    else:
        with pytest.raises(UnsupportedError, match=f"needs onnxruntime {least} or newer, this is {installed}") as error:
            read_runnable(artifact)
        assert error.value.fix == f"pip install 'onnxruntime>={least}'"


@pytest.mark.parametrize("verb", [["generate", "-p", "a"], ["validate"], ["bench"], ["eval", "--tasks", "a.jsonl"]])
def test_every_verb_that_runs_the_graph_asks_for_the_version(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: list[str]
) -> None:
    write_manifest(artifact, read_manifest(artifact).model_copy(update={"least_onnxruntime": "99.1"}))
    assert app.run([verb[0], str(artifact), *verb[1:]]) == UnsupportedError.exit_code
    assert "the artifact needs onnxruntime 99.1 or newer" in capsys.readouterr().err
    assert app.run(["verify", str(artifact)]) == 0
    assert app.run(["compare", str(artifact)]) == 0


def test_least_version_is_in_the_card_and_is_left_out_of_older_manifests(artifact: Path) -> None:
    older = read_manifest(artifact)
    assert "least_onnxruntime" not in (artifact / MANIFEST).read_text()
    assert verify(artifact) == ()
    assert "The graph needs" not in model_card(older)
    newer = older.model_copy(update={"least_onnxruntime": LEAST_ONNXRUNTIME})
    write_manifest(artifact, newer)
    assert read_manifest(artifact) == newer
    assert f"The graph needs onnxruntime {LEAST_ONNXRUNTIME} or newer." in model_card(newer)


@pytest.mark.parametrize("version", ["newest", "", "1.27; rm", 7])
def test_manifest_is_broken_when_its_least_version_is_none(artifact: Path, version: object) -> None:
    data = json.loads((artifact / MANIFEST).read_text())
    (artifact / MANIFEST).write_text(json.dumps({**data, "least_onnxruntime": version}))
    with pytest.raises(ArtifactError, match="least_onnxruntime"):
        read_manifest(artifact)


def test_manifest_of_a_version_without_some_fields_is_whole(artifact: Path) -> None:
    path = artifact / MANIFEST
    text = path.read_text().partition(',\n  "sha256": "')[0].replace('  "peers": [],\n', "")
    assert "peers" not in text
    digest = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(f'{text},\n  "sha256": "{digest}"\n}}\n')
    assert verify(artifact) == ()
    path.write_text(path.read_text().replace('"context": 64', '"context": 65'))
    assert verify(artifact) == (f"{MANIFEST}: changed",)
