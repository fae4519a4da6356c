"""Killed or interrupted at the start of each stage, `compress` leaves nothing that looks finished."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvslim.export.package import check_output, staging

STAGES = [
    "load",
    "calibrate",
    "plan",
    "held-out text",
    "export the plain baseline",
    "export the slim graph",
    "validate",
]
# One process imports torch and forks a child for each stage, which saves the imports of all but one.
DRIVER = """
import json, os, signal, sys
from pathlib import Path
import kvslim.workshop
from kvslim import pipeline
from kvslim.recipe import load_recipe

model, folder, how = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])

class Killer:
    def __init__(self, at):
        self.at, self.seen = at, []
    def stage(self, name):
        self.seen.append(name)
        (folder / "stages.json").write_text(json.dumps(self.seen))
        if len(self.seen) == self.at:
            os.kill(os.getpid(), how)
    def track(self, items, label, total=None):
        yield from items

brief = ["validation.recall_items=2", "validation.samples=2", "calibration.samples=2", "calibration.length=32"]
for at in range(1, 8):
    child = os.fork()
    if child == 0:
        try:
            pipeline.compress(model, load_recipe("small", brief), folder / str(at) / "out", progress=Killer(at))
        except KeyboardInterrupt:
            os._exit(130)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_nothing_looks_finished_when_stopped_at_any_stage(
    tiny_llama: Path, tmp_path: Path, how: signal.Signals, code: int
) -> None:
    command = [sys.executable, "-W", "ignore", "-c", DRIVER, str(tiny_llama), str(tmp_path), str(int(how))]
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
