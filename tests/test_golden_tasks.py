"""Two tasks of the demo's world: one recipe keeps other heads for each, and each loses less on its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.quality.tasks import tasks
from benchmarks.subjects import SUBJECTS


@pytest.mark.thorough
@pytest.mark.golden
@pytest.mark.timeout(900)  # minutes on a busy machine
def test_each_task_keeps_other_heads_and_loses_less_on_its_own(tmp_path: Path) -> None:
    questions, stories = tasks(SUBJECTS["demo"].source(tmp_path), items=80)
    assert (questions["calibrated_on"], stories["calibrated_on"]) == ("questions", "stories")
    assert questions["removed"] != stories["removed"]
    assert questions["kl_questions"] < stories["kl_questions"]
    assert stories["kl_stories"] < questions["kl_stories"]
