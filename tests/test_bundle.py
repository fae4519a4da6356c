"""One file that runs an artifact where there is no network."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.paths import ROOT
from support.tiny_writer import writer_artifact
from support.wheelhouse import write_wheel

from kvslim.bundle import archive, wheels
from kvslim.cli import app
from kvslim.packages import small_install
from kvslim.recipe import shipped_recipes

HERE = f"linux-{platform.machine()}"
PYTHON = ".".join(platform.python_version_tuple()[:2])
NOWHERE = "http://127.0.0.1:9"
NO_INDEX = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return writer_artifact(tmp_path)


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """One file stands for all wheels."""
    monkeypatch.setattr(archive, "download", lambda folder, *_: (folder / "pip-1-py3-none-any.whl").write_text("pip"))


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip finds the small install in."""
    folder = tmp_path_factory.mktemp("wheels")
    for pin in ("pip", *small_install()):
        write_wheel(pin.partition("==")[0], folder)
    return folder


def offline(command: list[str], **variables: str) -> SimpleNamespace:
    """Runs a command that reaches no other machine."""
    shut = subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0
    known = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    done = subprocess.run(
        [*(["unshare", "-rn"] if shut else []), *command],
        env={
            **known,
            "HTTPS_PROXY": NOWHERE,
            "HTTP_PROXY": NOWHERE,
            "PYTHON": shutil.which("python3") or "",
            **variables,
        },
        input="Hello\n",
        capture_output=True,
        text=True,
        timeout=280,
    )
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


@pytest.mark.slow
@pytest.mark.skipif(HERE not in wheels.PLATFORMS, reason="no bundle for this machine")
def test_bundle_runs_in_a_fresh_folder_without_a_network(
    artifact: Path,
    wheelhouse: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in {**NO_INDEX, "PIP_FIND_LINKS": str(wheelhouse)}.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "demo.tar.gz"
    assert app.run(["bundle", str(artifact), "--platform", HERE, "-o", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == file.stat().st_size
    assert len(told["wheels"]) == len(small_install()) + 2  # KVSlim's own, and pip's

    with tarfile.open(file) as packed:
        packed.extractall(tmp_path / "there", filter="data")
    run = str(tmp_path / "there" / "demo" / "run")
    options = ["-p", "One two", "--max-new-tokens", "6"]
    found = offline([run, "generate", *options])
    assert found.code == 0, found.err
    assert app.run(["generate", str(artifact), *options]) == 0
    assert found.out == capsys.readouterr().out
    assert offline([run, "verify"]).code == 0
    assert offline([run, "doctor"]).code == 0, "the small install is enough"
    assert "small install" in offline([run, "doctor"]).out

    (tmp_path / "there").rename(tmp_path / "elsewhere")
    run = str(tmp_path / "elsewhere" / "demo" / "run")
    chatted = offline([run])
    assert chatted.code == 0, chatted.err
    assert chatted.out.strip()


def unpacked(artifact: Path, tmp_path: Path) -> Path:
    file = tmp_path / "demo.tar.gz"
    archive.write_bundle(artifact, file, HERE, PYTHON)
    with tarfile.open(file) as packed:
        packed.extractall(tmp_path, filter="data")
    return tmp_path / "demo"


def change_a_file(folder: Path) -> None:
    (folder / "artifact" / "tokenizer.json").write_text("{}")


def ask_for_another_machine(folder: Path) -> None:
    run = folder / "run"
    run.write_text(run.read_text().replace(platform.machine(), "riscv64"))


def ask_for_another_python(folder: Path) -> None:
    run = folder / "run"
    run.write_text(run.read_text().replace(PYTHON, "3.99"))


@pytest.mark.usefixtures("no_download")
@pytest.mark.skipif(HERE not in wheels.PLATFORMS, reason="no bundle for this machine")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_a_file, "a file was changed or is missing"),
        (ask_for_another_machine, "this bundle is for riscv64"),
        (ask_for_another_python, "this bundle needs Python 3.99"),
    ],
)
def test_run_refuses_to_start(artifact: Path, tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    folder = unpacked(artifact, tmp_path)
    change(folder)
    found = offline([str(folder / "run")])
    assert found.code == 4
    assert f"error: {message}" in found.err
    assert "fix: " in found.err
    assert not (folder / "environment").exists()


@pytest.mark.usefixtures("no_download")
@pytest.mark.skipif(HERE not in wheels.PLATFORMS, reason="no bundle for this machine")
@pytest.mark.parametrize(("broken", "message"), [("-m", "no environment can be made here"), ("-c", "needs Python")])
def test_run_says_what_python_lacks(artifact: Path, tmp_path: Path, broken: str, message: str) -> None:
    folder, python = unpacked(artifact, tmp_path), tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" != {broken} ] || exit 1\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    found = offline([str(folder / "run")], PYTHON=str(python))
    assert (found.code, found.err.splitlines()[0][:7]) == (4, "error: ")
    assert message in found.err


@pytest.mark.usefixtures("no_download")
def test_same_artifact_gives_the_same_bytes(artifact: Path, tmp_path: Path) -> None:
    first, second = (
        archive.write_bundle(artifact, tmp_path / folder / "demo.tar.gz", HERE, PYTHON)
        for folder in ("one", "two")
        if (tmp_path / folder).mkdir() is None
    )
    os.utime(artifact / "model.onnx", (0, 0))
    again = archive.write_bundle(artifact, tmp_path / "two" / "demo.tar.gz", HERE, PYTHON)
    assert first.sha256 == second.sha256 == again.sha256
    assert first.sha256 == hashlib.sha256((tmp_path / "one" / "demo.tar.gz").read_bytes()).hexdigest()


@pytest.mark.usefixtures("no_download")
def test_digests_are_those_of_every_other_file(artifact: Path, tmp_path: Path) -> None:
    folder = unpacked(artifact, tmp_path)
    sums = dict(line.split("  ")[::-1] for line in (folder / archive.SUMS).read_text().splitlines())
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    del files[archive.SUMS]
    assert sums == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    assert {"run", "artifact/model.onnx", "artifact/kvslim.json"} <= sums.keys()
    assert os.access(folder / "run", os.X_OK)


def test_own_wheel_has_every_file_and_lists_it(tmp_path: Path) -> None:
    wheel = zipfile.ZipFile(wheels.write_own_wheel(tmp_path))
    names = set(wheel.namelist())
    sources = (path for path in (ROOT / "kvslim").rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert {path.relative_to(ROOT).as_posix() for path in sources} <= names
    assert {f"kvslim/recipes/{name}.yaml" for name in shipped_recipes()} <= names
    about = f"kvslim-{metadata.version('kvslim')}.dist-info"
    assert {line.split(",")[0] for line in wheel.read(f"{about}/RECORD").decode().splitlines()} == names
    assert "kvslim = kvslim.cli.app:main" in wheel.read(f"{about}/entry_points.txt").decode()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"--platform": "linux-aarch46"}, 4, "did you mean 'linux-aarch64'?"),
        ({"--python": "3.9"}, 4, "'3.9' is not a version of Python"),
        ({"--python": "eleven"}, 4, "'eleven' is not a version of Python"),
        ({"--python": "3.11.4"}, 4, "the first two numbers"),
        ({"--python": "3.999999999"}, 4, "is not a version of Python"),  # pip would list all before it
        ({"-o": "bundle.zip"}, 2, "write -o bundle.tar.gz"),
        ({"-o": ".tar.gz"}, 2, "write -o bundle.tar.gz"),
        ({"-o": "artifact/bundle.tar.gz"}, 2, "would lie in the artifact"),
        ({"-o": "/proc/bundle.tar.gz"}, 2, "cannot write"),
        ({"-o": "nowhere/bundle.tar.gz"}, 2, "its folder does not exist"),
        ({"ARTIFACT": "nowhere"}, 5, "no such artifact"),
        ({}, 5, f"no wheels for {HERE}"),  # pip has nowhere to look
    ],
)
def test_bundle_is_refused(
    artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, str],
    code: int,
    message: str,
) -> None:
    for name, value in {**NO_INDEX, "PIP_FIND_LINKS": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    given = {"ARTIFACT": str(artifact), "--platform": HERE, "-o": "bundle.tar.gz", **options}
    command = [given.pop("ARTIFACT"), *(part for option in given.items() for part in option)]
    before = set(tmp_path.rglob("*"))
    assert app.run(["bundle", *command]) == code
    err = capsys.readouterr().err
    assert message in err
    assert "ERROR" not in err
    assert ("download" in err) == (not options)  # begun by nothing that could be refused before
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("caught", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left"), 2)])
def test_download_that_ends_early_leaves_the_old_file(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caught: BaseException, code: int
) -> None:
    def download(folder: Path, *_: object) -> None:
        (folder / "half.whl").write_text("PK")
        raise caught

    monkeypatch.setattr(archive, "download", download)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    out = tmp_path / "demo.tar.gz"
    out.write_text("the one before")
    before = set(tmp_path.rglob("*"))
    assert app.run(["bundle", str(artifact), "--platform", HERE, "-o", str(out)]) == code
    assert set(tmp_path.rglob("*")) == before
    assert out.read_text() == "the one before"


def test_missing_pip_is_told_before_the_download(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version = metadata.version

    def without_pip(name: str) -> str:
        if name == "pip":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(wheels.metadata, "version", without_pip)
    assert app.run(["bundle", str(artifact), "--platform", HERE, "-o", str(tmp_path / "b.tar.gz")]) == 5
    assert "python -m ensurepip" in capsys.readouterr().err


@pytest.mark.usefixtures("no_download")
def test_what_to_type_there_is_quoted(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["bundle", str(artifact), "--platform", HERE, "-o", str(tmp_path / "my model.tar.gz")]) == 0
    assert "tar -xf 'my model.tar.gz' && 'my model/run'" in capsys.readouterr().out


@pytest.mark.usefixtures("no_download")
def test_changed_artifact_is_not_bundled(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (artifact / "tokenizer.json").write_text("{}")
    assert app.run(["bundle", str(artifact), "--platform", HERE, "-o", str(tmp_path / "b.tar.gz")]) == 4
    assert "tokenizer.json: changed" in capsys.readouterr().err
