"""A system that refuses: memory, disks, pipes, places that cannot be written, names that are no words."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny_artifact import fill
from support.tiny_writer import writer_artifact

from kvslim.cli import app
from kvslim.cli.memory import LEAST_MIB, LEAST_WITH_TORCH_MIB
from kvslim.errors import ArtifactError, OutputError, UsageError
from kvslim.export.manifest import verify
from kvslim.export.package import staging
from kvslim.runtime.opening import open_session
from kvslim.unexpected import MemoryLimitError, explained

COMMAND = [sys.executable, "-m", "kvslim.cli.app"]
NAMES = ("-rf", "two words", "ünïcode 👩‍👩‍👧 日本", "%s {x} 'q' \"d\"", "line\nfeed", "*?[a]", "demo@1")


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """An artifact that runs."""
    return writer_artifact(tmp_path)


def clear(err: str) -> bool:
    return [line.split(":")[0] for line in err.splitlines()] == ["error", "  where", "  fix"]


@pytest.mark.parametrize("name", NAMES)
def test_artifact_works_when_its_name_is_odd(
    artifact: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact.rename(artifact.parent / name)
    monkeypatch.chdir(artifact.parent)
    for arguments in (["verify"], ["inspect"], ["generate", "-p", "héllo", "--max-new-tokens", "2"]):
        assert app.run([*arguments, "--json", "--", name]) == 0, capsys.readouterr().err
        assert json.loads(capsys.readouterr().out)


def test_name_that_is_no_unicode_is_told_in_json(tmp_path: Path) -> None:
    command = [*COMMAND, "verify", "--json", str(tmp_path / "\udcff")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 5
    assert json.loads(done.stdout)["error"]["where"] == str(tmp_path / "\udcff")
    assert clear(done.stderr)


def test_graph_is_refused_when_its_path_is_no_unicode(artifact: Path) -> None:
    odd = artifact.rename(artifact.parent / "\udcff")
    assert verify(odd) == ()
    with pytest.raises(UsageError, match="not UTF-8"):
        open_session(odd)


def test_full_disk_behind_stdout_is_one_error() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, "recipes", "--json"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert "No space left" in done.stderr
    assert clear(done.stderr)


def test_streams_that_are_closed_hold_nothing_and_take_anything(artifact: Path) -> None:
    kvslim = shlex.join(COMMAND)
    for line, code in (
        (f"{kvslim} verify {artifact} >&-", 0),
        (f"{kvslim} verify {artifact} 2>&-", 0),
        (f"{kvslim} verify {artifact}/nothing >&- 2>&-", 5),
        (f"{kvslim} generate {artifact} --file - <&-", 0),
    ):
        found = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
        assert (found.returncode, "Traceback" in found.stderr) == (code, False), (line, found.stderr)


def test_json_is_json_where_stdout_takes_ascii_alone(artifact: Path) -> None:
    command = [*COMMAND, "verify", "no-\U0001f600", "--json"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    found = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert "no-\U0001f600" in json.loads(found.stdout)["error"]["where"]


def test_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("good")
    written = f"write_text(Path({str(page)!r}), 'a' * 9999, '')"
    program = f"from pathlib import Path; from kvslim.cli.inputs import write_text; {written}"
    limited = f"ulimit -f 1; exec {shlex.quote(sys.executable)} -c {shlex.quote(program)}"
    done = subprocess.run(["sh", "-c", limited], capture_output=True, text=True, check=False)
    assert "OutputError: cannot write: File too large" in done.stderr
    assert (page.read_text(), [path.name for path in tmp_path.iterdir()]) == ("good", ["page.html"])


def test_closed_pipe_ends_in_silence() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        done = subprocess.run(
            [*COMMAND, "recipes", "--json"], stdout=pipe, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_memory_limit_is_one_error_when_the_cache_does_not_fit(artifact: Path) -> None:
    manifest = artifact / "kvslim.json"
    manifest.write_text(manifest.read_text().replace('"max_context": 512', '"max_context": 1000000000'))
    code = (
        "import resource, sys; from kvslim.cli.app import run; import kvslim.cli.completions\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31)); sys.exit(run(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "generate", str(artifact), "-p", "a", "--context", "100000000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (4, "")
    assert "error: out of memory" in done.stderr
    assert "ulimit -v" in done.stderr
    assert clear(done.stderr)


def compress(model: Path, out: Path) -> list[str]:
    """Arguments of a compression that measures little."""
    brief = ("calibration.samples=2", "calibration.length=48", "validation.samples=2", "validation.length=48")
    settings = [part for setting in (*brief, "validation.recall_items=2") for part in ("--set", setting)]
    return ["compress", str(model), "-r", "lossless", "-o", str(out), *settings]


def limited(mib: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command that may have so much memory."""
    command = f"ulimit -v {mib * 1024}; exec {shlex.join([*COMMAND, *arguments])}"
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("mib", [100, 580, 840, LEAST_WITH_TORCH_MIB - 1])
def test_memory_limit_is_one_error_before_native_libraries_abort(mib: int, tmp_path: Path, tiny_llama: Path) -> None:
    done = limited(mib, "compress", str(tiny_llama), "-o", str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (4, "")
    assert f"limit of {mib} MiB" in done.stderr
    assert f"ulimit -v {LEAST_WITH_TORCH_MIB * 1024}" in done.stderr
    assert clear(done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_commands_work_with_the_memory_that_they_ask_for(tmp_path: Path, tiny_llama: Path, artifact: Path) -> None:
    assert limited(LEAST_MIB, "generate", str(artifact), "-p", "a").returncode == 0
    done = limited(LEAST_WITH_TORCH_MIB, *compress(tiny_llama, tmp_path / "out"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "cause",
    [
        MemoryError("Unable to allocate 8 GiB"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    ],
)
def test_lack_of_memory_is_told_however_deep_it_came_up(cause: Exception) -> None:
    assert isinstance(explained(cause), MemoryLimitError)
    error = ArtifactError("onnxruntime cannot load the graph", where="model.onnx", fix="compress again")
    error.__cause__ = cause
    assert isinstance(explained(error), MemoryLimitError)
    assert explained(error).where == "model.onnx"


def test_other_errors_stay_what_they_are() -> None:
    error = ArtifactError("cannot allocate memory, says a file", where="x", fix="y")
    assert explained(error) is error
    assert explained(PermissionError(13, "Permission denied", "config.json")).where == "config.json"
    assert explained(ZeroDivisionError("x")).exit_code == 1


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that not even root may write to."""
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    chattr = shutil.which("chattr") if os.geteuid() == 0 else None
    if os.geteuid() == 0 and (
        chattr is None or subprocess.run([chattr, "+i", folder], capture_output=True, check=False).returncode
    ):
        pytest.skip("root may write anywhere, and this file system has no immutable folders")
    yield folder
    if chattr:
        subprocess.run([chattr, "-i", folder], check=True)
    folder.chmod(0o755)


def test_read_only_folder_is_refused_before_the_weights_are_read(
    read_only: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["compress", str(tiny_llama), "-o", str(read_only / "out")]) == 2
    assert clear(capsys.readouterr().err)
    assert list(read_only.iterdir()) == []


def test_file_that_cannot_be_written_is_refused(
    read_only: Path, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["compare", str(artifact), "--html", str(read_only / "page.html")]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_at_once_leave_one_whole_artifact(tmp_path: Path, overwrite: bool) -> None:
    out = tmp_path / "out"
    slower = staging(out, overwrite)
    folder = slower.__enter__()
    fill(folder, "slower")
    with staging(out, overwrite) as other:
        fill(other, "faster")
    if overwrite:
        slower.__exit__(None, None, None)
    else:
        with pytest.raises(OutputError, match="exists already"):
            slower.__exit__(None, None, None)
    assert verify(out) == ()
    assert (out / "model.onnx").read_text() == ("slower" if overwrite else "faster")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_of_two_compressions_into_one_folder_one_wins_whole(tmp_path: Path, tiny_llama: Path) -> None:
    out = tmp_path / "out"
    command = [*COMMAND, *compress(tiny_llama, out)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], told
    (loser,) = (text for process, text in zip(both, told, strict=True) if process.returncode)
    assert str(out) in loser
    assert "--force" in loser
    assert verify(out) == ()
    assert list(tmp_path.iterdir()) == [out]
