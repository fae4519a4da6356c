"""Two tasks of the demo's world: one recipe keeps other heads for each, and each loses less on its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "tasks.py"


@pytest.mark.golden
@pytest.mark.timeout(900)  # minutes on a busy machine
def test_each_task_keeps_other_heads_and_loses_less_on_its_own() -> None:
    command = [sys.executable, str(BENCHMARK), "--items", "80"]
    table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    (questions, heads, on_questions, on_stories), (stories, other_heads, on_their_questions, on_their_stories) = rows
    assert (questions, stories) == ("questions", "stories")
    assert heads != other_heads
    assert float(on_questions) < float(on_their_questions)
    assert float(on_their_stories) < float(on_stories)
