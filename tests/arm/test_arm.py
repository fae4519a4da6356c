"""Artifacts on arm64: every kind of cache, every form of weights, the verbs, and a bundle without a network."""

from __future__ import annotations

import json
import platform
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arm.conftest import Board
from arm.graphs import GRAPHS
from arm.logits import decoded_from
from kvslim.cli import app

pytestmark = [pytest.mark.arm, pytest.mark.timeout(3600)]
Record = Callable[[str, object], None]

SAME = 1e-4
EDGES = 3  # tokens that may have a number on the edge between two integers, which is cached as either
PROMPT = "Here is a story of Mira and Oren. Mira's lamp is red. Oren"


def test_bundle_answers_in_a_fresh_root_without_a_network(
    board: Board, capsys: pytest.CaptureFixture[str], record_property: Record
) -> None:
    assert board.first.returncode == 0, board.first.stderr
    assert "every file is as it was written" in board.first.stdout
    connect = 'import socket; socket.create_connection(("1.1.1.1", 53), 5)'
    offline = board.run(f"demo/environment/bin/python -c '{connect}'")
    assert "Network is unreachable" in offline.stderr
    found = board.run(f'uname -m && demo/run generate -p "{PROMPT}" --max-new-tokens 12')
    assert found.returncode == 0, found.stderr
    machine, _, text = found.stdout.partition("\n")
    assert machine == "aarch64"
    options = ["--prompt", PROMPT, "--max-new-tokens", "12"]
    assert app.run(["generate", str(board.folder / "demo" / "artifact"), *options]) == 0
    assert text == capsys.readouterr().out
    record_property("bundle_mib", board.bundle.bytes / 2**20)
    print(f"\n{Path(board.bundle.file).name}: {board.bundle.bytes / 2**20:.1f} MiB")


def test_small_install_is_small(board: Board, capsys: pytest.CaptureFixture[str]) -> None:
    wheels = (board.folder / "demo" / "wheels").iterdir()
    mib = sum(entry.file_size for wheel in wheels for entry in zipfile.ZipFile(wheel).infolist()) / 2**20
    with capsys.disabled():
        print(f"\nsmall install for linux-aarch64: {mib:.1f} MiB")
    assert 100 < mib < 160


def test_server_of_the_bundle_answers(board: Board) -> None:
    shutil.copy(Path(__file__).parent / "ask_server.py", board.folder)
    found = board.run(f'demo/environment/bin/python ask_server.py "{PROMPT}"')
    assert found.returncode == 0, found.stderr
    written = board.run(f'demo/run generate -p "{PROMPT}" --max-new-tokens 12')
    assert written.stdout == f"{PROMPT}{found.stdout}"


def test_doctor_and_bench_run_there(board: Board) -> None:
    assert board.run("demo/run doctor").returncode == 0
    found = board.run("demo/run bench --context 16 --prompt 16 --repeats 3 --json")
    assert found.returncode == 0, found.stderr
    (result,) = json.loads(found.stdout)["artifacts"].values()
    assert result["peak_rss_mib"] > 0
    assert {timing["metric"] for timing in result["timings"]} == {"ttft_ms", "tpot_ms"}


def test_verify_refuses_a_changed_file_there(board: Board) -> None:
    change = "cp -r demo/artifact changed && echo >> changed/tokenizer.json"
    changed = board.run(f"{change} && demo/environment/bin/kvslim verify changed")
    assert changed.returncode == 4
    assert "tokenizer.json" in changed.stderr


@pytest.mark.parametrize("name", GRAPHS)
def test_logits_are_those_of_x86(graphs: Path, record_property: Record, name: str) -> None:
    here, there = (np.load(graphs / name / f"{machine}.npz") for machine in (platform.machine(), "aarch64"))
    assert set(here.files) == set(there.files)

    def apart(*runs: str) -> float:
        return float(max(np.abs(here[run] - there[run]).max() for run in runs))

    def between(machine: Any, first: str, second: str) -> float:
        return float(np.abs(machine[first] - machine[second]).max())

    found = apart("rounded, many", "rounded, one")
    is_float = "float, many" in here.files
    exact = apart("float, many", "float, one") if is_float else None
    costs = [between(each, "rounded, many", "float, many") if is_float else None for each in (here, there)]
    noise = between(here, "rounded, many", "rounded, one")
    continued = from_its_cache(graphs / name, there, "float" if is_float else "rounded")
    edges = None if continued is None else int((continued > SAME).sum())
    inside = None if continued is None else float(continued[continued <= SAME].max())
    recorded = {"graph": name, "apart": found, "noise": noise, "exact": exact, "continued": inside, "edges": edges}
    for key, value in {**recorded, "cost": costs[0], "cost_there": costs[1]}.items():
        record_property(key, value)
    assert here["rounded, many"].std() > 0.1
    if costs[0] is not None:  # kernels round what they multiply weights of integers with, not all alike
        assert found <= 2 * costs[0]
    if edges is not None:
        assert edges <= EDGES
    else:  # no integers, or none but the weights': inputs that are not rounded show that nothing else differs
        assert (found if exact is None else exact) <= SAME


def from_its_cache(graph: Path, there: Any, kind: str) -> np.ndarray | None:
    """How far logits of each token are apart where both machines start from one cache; None without integers in it."""
    caches = [there[key] for key in there.files if key.startswith(f"{kind}, cache")]
    if all(each.dtype.kind == "f" for each in caches):
        return None
    found = decoded_from(graph / f"{kind}.onnx", np.load(graph / "tokens.npy"), caches)
    apart: np.ndarray = np.abs(found - there[f"{kind}, one"]).max(-1)
    return apart
