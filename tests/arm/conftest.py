"""A board: a fresh root of arm64 under QEMU, with a bundle that was unpacked in it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from arm.graphs import write_graphs
from kvslim.bundle.archive import Bundle, write_bundle
from kvslim.pipeline import compress
from kvslim.recipe import load_recipe

HERE = Path(__file__).parent
ROOT = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvslim" / "arm64"
PLACE = "/host"
BRIEF = (
    "weights=fp32",
    "calibration.samples=8",
    "validation.samples=2",
    "validation.length=48",
    "validation.recall_items=2",
    "validation.prompts=[16]",
    "validation.contexts=[16]",
    "validation.repeats=3",
)
THERE = "3.11"  # the Python of Debian 12


@dataclass(frozen=True)
class Board:
    """An emulated board without a network.

    Attributes:
        folder: What lies in its `PLACE`.
        bundle: What was unpacked there.
        first: What the bundle's first start gave, which makes its environment.
    """

    folder: Path
    bundle: Bundle
    first: subprocess.CompletedProcess[str]

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command of its shell, in `PLACE`."""
        return run_in(self.folder, command)


def run_in(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    inside = ["sh", "-c", f"cd {PLACE} && {command}"]
    return subprocess.run(
        [str(HERE / "enter.sh"), str(ROOT), f"{folder}={PLACE}", "--", *inside],
        capture_output=True,
        text=True,
        timeout=3000,
    )


@pytest.fixture(scope="session")
def board(tmp_path_factory: pytest.TempPathFactory) -> Board:
    """The board, on which the demo's bundle has been started once."""
    if not ROOT.is_dir() or shutil.which("qemu-aarch64-static") is None:
        if os.environ.get("KVSLIM_REQUIRE_ARM") == "1":
            pytest.fail(f"no root at {ROOT}, or no QEMU, and KVSLIM_REQUIRE_ARM=1 asks for both: run `make test-arm`")
        pytest.skip(f"needs QEMU and a root at {ROOT}: run `make test-arm`")
    folder = tmp_path_factory.mktemp("board")
    compress("demo", load_recipe("lossless", BRIEF), folder / "artifact")
    bundle = write_bundle(folder / "artifact", folder / "demo.tar.gz", "linux-aarch64", THERE)
    with tarfile.open(bundle.file) as packed:
        packed.extractall(folder, filter="data")
    return Board(folder, bundle, run_in(folder, "demo/run verify"))


@pytest.fixture(scope="session")
def graphs(board: Board, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graphs, each with what both machines compute with it."""
    folder = board.folder / "graphs"
    folder.mkdir()
    write_graphs(folder, tmp_path_factory.mktemp("models"))
    script = shutil.copy(HERE / "logits.py", board.folder)
    subprocess.run([sys.executable, str(script), str(folder)], check=True)
    found = board.run(f"demo/environment/bin/python logits.py {shlex.quote(PLACE)}/graphs")
    assert found.returncode == 0, found.stderr
    return folder
