"""Killed or interrupted at each stage or any moment, `compress` leaves nothing that looks finished."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny_artifact import SPEC

from kvslim import stages
from kvslim.export.manifest import read_manifest
from kvslim.export.package import check_output, staging
from kvslim.recipe import load_recipe

STAGES = list(stages.expected("compress", SPEC, load_recipe("lossless", ["weights=fp32"])))
# One process imports torch and forks a child for each stage, which saves the imports of all but one.
DRIVER = """
import json, os, shutil, signal, sys
from pathlib import Path
import kvslim.prepared
from kvslim import pipeline
from kvslim.recipe import load_recipe

model, folder, how = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])

class Killer:
    def __init__(self, at):
        self.at, self.seen = at, []
    def expect(self, stages):
        pass
    def stage(self, name):
        self.seen.append(name)
        (folder / "stages.json").write_text(json.dumps(self.seen))
        if len(self.seen) == self.at:
            os.kill(os.getpid(), how)
    def track(self, items, label, total=None, weights=None):
        yield from items

brief = ["weights=fp32"]
brief += ["validation.recall_items=2", "validation.samples=2", "calibration.samples=2", "calibration.length=32"]
for at in range(1, int(sys.argv[4]) + 1):
    for kept in ("statistics", "texts"):
        shutil.rmtree(Path(os.environ["KVSLIM_CACHE"], kept), ignore_errors=True)
    child = os.fork()
    if child == 0:
        try:
            pipeline.compress(model, load_recipe("lossless", brief), folder / str(at) / "out", progress=Killer(at))
        except KeyboardInterrupt:
            os._exit(130)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

KILLS = 20
# Moments are shares of the processor time that one whole run takes, so that a busy machine moves none of them.
RANDOM_DRIVER = """
import os, random, signal, sys, time
from pathlib import Path
import kvslim.prepared
from kvslim import pipeline
from kvslim.export.manifest import verify
from kvslim.recipe import load_recipe

model, folder, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
brief = [
    "validation.recall_items=1", "validation.samples=2", "validation.length=32", "validation.recall_distance=16",
    "validation.prompts=[4]", "validation.contexts=[4]", "validation.repeats=3",
    "calibration.samples=1", "calibration.length=16", "compensate=false", "weights=fp32",
]
recipe = load_recipe("lossless", brief)

def start(out):
    child = os.fork()
    if child == 0:
        pipeline.compress(model, recipe, out, overwrite=True)
        os._exit(0)
    return child

def ticks(child):
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])

def whole_run(out):
    child, last = start(out), 0
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        last = ticks(child)
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return last

most, chance = whole_run(folder / "first"), random.Random(0)
out = folder / "out"
for _ in range(kills):
    child, moment = start(out), chance.random() * most
    while ticks(child) < moment and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, "none" if not out.exists() else "whole" if verify(out) == () else "broken", flush=True)
whole_run(out)
print(*verify(out), *sorted(path.name for path in folder.iterdir()), flush=True)
"""

HEALING_DRIVER = """
import os, signal, sys
from pathlib import Path
import kvslim.prepared.decoder
from kvslim import pipeline
from kvslim.healing import distil, state
from kvslim.recipe import load_recipe

model, folder = sys.argv[1], Path(sys.argv[2])
(folder / "text.txt").write_text("one two three four five six seven eight nine ten " * 100)
(folder / "recipe.yaml").write_text("methods: [{kv_hdc: {bits: 4}}]")
brief = [
    "validation.recall_items=1", "validation.samples=2", "validation.length=32", "validation.recall_distance=16",
    "validation.prompts=[4]", "validation.contexts=[4]", "validation.repeats=3", "weights=fp32", "compensate=false",
    "calibration.samples=4", "calibration.length=48", f"calibration.source={folder / 'text.txt'}",
    "heal={steps: 12, rate: 1e-3}", "keep_edits=true",
]
recipe = load_recipe(str(folder / "recipe.yaml"), brief)
step, save_file = distil._Training._step, state.save_file

def dies_in_a_step():
    distil._Training._step = lambda self, at: os.kill(os.getpid(), signal.SIGKILL) if at == 5 else step(self, at)

def dies_while_it_saves():
    saved = []
    def saving(tensors, path, told):
        save_file(tensors, path, told)
        saved.append(path)
        if len(saved) == 3:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    state.save_file = saving

def run(name, prepare=lambda: None):
    child = os.fork()
    if child == 0:
        os.environ["KVSLIM_CACHE"] = str(folder / f"cache of {name}")
        prepare()
        pipeline.compress(model, recipe, folder / name)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

run("killed", dies_in_a_step)
run("killed", dies_while_it_saves)
run("killed")
run("whole")
"""


@pytest.mark.slow
def test_training_that_was_killed_twice_ends_with_the_same_artifact(tiny_llama: Path, tmp_path: Path) -> None:
    """Once in a step, and once while it wrote what it had reached."""
    command = [sys.executable, "-W", "ignore", "-c", HEALING_DRIVER, str(tiny_llama), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    killed = str(-signal.SIGKILL)
    assert done.stdout.split() == [killed, killed, "0", "0"], done.stderr
    left = [path for path in (tmp_path / "cache of killed" / "healing").rglob("*") if path.is_file()]
    assert [path.name for path in left] == ["state.safetensors"]
    resumed, whole = (read_manifest(tmp_path / name) for name in ("killed", "whole"))
    assert whole.healing is not None
    assert whole.healing.kept
    for name in ("model.onnx", "model.onnx_data", "edits.safetensors"):
        assert resumed.files[name] == whole.files[name]


@pytest.mark.thorough
@pytest.mark.slow
def test_nothing_looks_finished_when_killed_at_random_moments(tiny_llama: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", RANDOM_DRIVER, str(tiny_llama), str(tmp_path), str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    *moments, last = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(moments) == KILLS
    assert {moment.split()[1] for moment in moments} <= {"none", "whole"}
    assert sum(moment.startswith("-9 ") for moment in moments) >= KILLS - 2
    assert last == "first out"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code"),
    [
        (signal.SIGKILL, -signal.SIGKILL),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.thorough),
    ],
)
def test_nothing_looks_finished_when_stopped_at_any_stage(
    tiny_llama: Path, tmp_path: Path, how: signal.Signals, code: int
) -> None:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        DRIVER,
        str(tiny_llama),
        str(tmp_path),
        str(int(how)),
        str(len(STAGES)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(int(code))] * len(STAGES), done.stderr
    assert json.loads((tmp_path / "stages.json").read_text()) == STAGES
    for at in range(1, len(STAGES) + 1):
        out = tmp_path / str(at) / "out"
        assert not out.exists()
        check_output(out)
        with staging(out) as folder:
            (folder / "file").write_text("a later run is not in the way of what was left")
        assert [path.name for path in out.parent.iterdir()] == ["out"]
