"""The artifact folder: whole or absent, and never over foreign files."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from support.tiny_artifact import fill

from kvslim.errors import OutputError
from kvslim.export.manifest import (
    MANIFEST,
    verify,
)
from kvslim.export.package import check_output, staging


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


def test_check_output_leaves_no_trace(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b")
    assert names(tmp_path) == set()
