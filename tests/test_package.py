"""The artifact folder: whole or absent, never over foreign files, every change found."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from support.tiny_artifact import fill

from kvslim.cli import app
from kvslim.errors import ArtifactError, NotFoundError, OutputError, UnsupportedError
from kvslim.export.manifest import (
    LEAST_ONNXRUNTIME,
    MANIFEST,
    read_manifest,
    read_runnable,
    verify,
    write_manifest,
)
from kvslim.export.package import check_output, staging
from kvslim.report.card import model_card


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    with staging(tmp_path / "artifact") as folder:
        fill(folder)
    return tmp_path / "artifact"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_staging_publishes_only_the_folder_when_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "artifact"
    with staging(out) as folder:
        fill(folder)
        assert folder.parent == out.parent
        assert not out.exists()
    assert names(out.parent) == {"artifact"}
    assert verify(out) == ()


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_staging_leaves_nothing_when_the_block_fails(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), staging(tmp_path / "artifact") as folder:
        fill(folder)
        raise failure
    assert names(tmp_path) == set()


def test_staging_keeps_the_old_artifact_when_the_block_fails(artifact: Path) -> None:
    before = (artifact / MANIFEST).read_bytes()
    with pytest.raises(ValueError, match="stop"), staging(artifact, overwrite=True):
        raise ValueError("stop")
    assert (artifact / MANIFEST).read_bytes() == before
    assert names(artifact.parent) == {"artifact"}


def test_staging_replaces_an_artifact_when_told_to(artifact: Path) -> None:
    with staging(artifact, overwrite=True) as folder:
        fill(folder, "other weights")
    assert (artifact / "model.onnx").read_text() == "other weights"
    assert names(artifact.parent) == {"artifact"}


def test_staging_keeps_the_old_artifact_when_the_last_rename_fails(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(errno.EIO, "input/output error", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="input/output"), staging(artifact, overwrite=True) as folder:
        fill(folder, "other weights")
    assert (artifact / "model.onnx").read_text() == "weights"
    assert names(artifact.parent) == {"artifact"}


def test_staging_refuses_an_artifact_when_not_told_to_replace_it(artifact: Path) -> None:
    with pytest.raises(OutputError, match="exists") as caught, staging(artifact):
        pytest.fail("the block must not run")
    assert "--force" in caught.value.fix


@pytest.mark.parametrize("manifest", [None, "", "{}", "[1, 2", '{"format": 9}'])
def test_staging_refuses_a_foreign_folder_even_when_told_to_replace_it(tmp_path: Path, manifest: str | None) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    if manifest is not None:
        (out / MANIFEST).write_text(manifest)
    with pytest.raises(OutputError, match="not an artifact"), staging(out, overwrite=True):
        pytest.fail("the block must not run")
    assert (out / "thesis.txt").read_text() == "years of work"


def test_staging_refuses_an_artifact_when_it_also_holds_foreign_files(artifact: Path) -> None:
    (artifact / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt"), staging(artifact, overwrite=True):
        pytest.fail("the block must not run")


def test_staging_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(OutputError, match="file"), staging(tmp_path / "file", overwrite=True):
        pytest.fail("the block must not run")


def test_staging_accepts_an_empty_folder(tmp_path: Path) -> None:
    with staging(tmp_path) as folder:
        fill(folder)
    assert verify(tmp_path) == ()


def test_staging_keeps_a_symbolic_link_when_replacing_its_target(artifact: Path) -> None:
    link = artifact.with_name("latest")
    link.symlink_to(artifact)
    with staging(link, overwrite=True) as folder:
        fill(folder, "other weights")
    assert link.is_symlink()
    assert (artifact / "model.onnx").read_text() == "other weights"


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from kvslim.export.package import staging
    with staging(Path(sys.argv[1])) as folder:
        (folder / "model.onnx").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
"""
WAITING = """
    import sys
    from pathlib import Path
    from kvslim.export.package import staging
    with staging(Path(sys.argv[1])) as folder:
        print(folder, flush=True)
        sys.stdin.read()
        raise SystemExit
"""


def python(code: str, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), str(out)]
    root = Path(__file__).parent.parent
    return subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_staging_removes_the_partial_folder_of_a_killed_process(tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    with python(KILLED, out) as process:
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 1
    assert not out.exists()
    with staging(out) as folder:
        fill(folder)
    assert names(tmp_path) == {"artifact"}


def test_staging_spares_the_partial_folder_of_a_living_process(tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    with python(WAITING, out) as process:
        assert process.stdout is not None
        other = Path(process.stdout.readline().strip())
        with staging(out) as folder:
            fill(folder)
        assert other.is_dir()
        process.communicate("")
    assert names(tmp_path) == {"artifact"}


def test_staging_brings_the_old_artifact_back_when_killed_between_the_renames(artifact: Path) -> None:
    artifact.rename(artifact.with_name("artifact.old-1a2b"))
    with pytest.raises(OutputError, match="exists"):
        check_output(artifact)
    assert verify(artifact) == ()
    assert names(artifact.parent) == {"artifact"}


def test_staging_tells_of_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left") as caught, staging(tmp_path / "artifact") as folder:
        fill(folder)
    assert "free some space" in caught.value.fix
    assert names(tmp_path) == set()


def test_staging_passes_on_errors_that_are_not_about_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staging(tmp_path / "artifact"):
        (tmp_path / "elsewhere" / "missing.txt").read_text()


def test_check_output_refuses_when_a_file_stands_in_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(OutputError, match="folder is needed"):
        check_output(tmp_path / "file" / "below" / "artifact")


def test_check_output_refuses_when_the_parent_takes_no_folders() -> None:
    with pytest.raises(OutputError, match="cannot write"):
        check_output(Path("/proc/kvslim/artifact"))


def test_check_output_refuses_when_the_disk_is_too_small(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="not enough space"):
        check_output(tmp_path / "artifact", needed_bytes=2**60)


def test_check_output_leaves_no_trace(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b", needed_bytes=1)
    assert names(tmp_path) == set()


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
        ("[]", "valid"),
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
