"""The search for the least memory in which a process answers, and the limit that it sets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.paths import ROOT
from support.tiny_graph import write_tiny

from benchmarks.memory import least_memory
from benchmarks.memory.changed_session import CHANGES
from benchmarks.memory.group import answers_within, missing

HELD = 96  # MiB that a process writes to


def trials(monkeypatch: pytest.MonkeyPatch, needed: int) -> list[float]:
    """The limits that the search will have tried, of a process that needs so much of its 200 MiB."""
    tried: list[float] = []

    def answers(mib: float, *_: object) -> bool:
        tried.append(mib)
        return mib >= needed

    unlimited = subprocess.CompletedProcess([], 0, stdout="200\n")
    monkeypatch.setattr(least_memory.subprocess, "run", lambda *_, **__: unlimited)
    monkeypatch.setattr(least_memory, "_answers", answers)
    return tried


@pytest.mark.parametrize("needed", [11, 137, 199, 230])
@pytest.mark.parametrize("step", [1, 8])
@pytest.mark.parametrize("guess", [None, 130])
def test_search_ends_within_a_step_of_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needed: int, step: int, guess: float | None
) -> None:
    tried = trials(monkeypatch, needed)
    limit, peak = least_memory.least_limit(["ours"], tmp_path, step, guess)
    assert peak == 200
    assert needed <= limit <= needed + step
    assert limit in tried
    assert len(tried) < 20


@pytest.mark.parametrize("needed", [125, 133, 142])
def test_search_from_a_good_guess_takes_few_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needed: int
) -> None:
    tried = trials(monkeypatch, needed)
    least_memory.least_limit(["genai"], tmp_path, 4, 130)
    assert len(tried) <= 5


@pytest.mark.skipif(missing() is not None, reason=missing() or "")
def test_a_process_ends_where_it_needs_more_than_its_limit() -> None:
    held = [sys.executable, "-c", f"held = b'x' * ({HELD} << 20)"]
    assert answers_within(2 * HELD, held, 60)
    assert not answers_within(HELD / 2, held, 60)
    assert not answers_within(2 * HELD, [sys.executable, "-c", "raise SystemExit(1)"], 60)
    assert not answers_within(2 * HELD, [sys.executable, "-c", "import time; time.sleep(60)"], 0.5)
    assert missing() is None  # no group is left: another of its name can be made


@pytest.mark.parametrize("change", ["an arena that grows by what is asked for", "chunks of 64"])
def test_a_changed_session_answers_and_tells_its_memory(tmp_path: Path, change: str) -> None:
    assert change in CHANGES
    graph = write_tiny(tmp_path / "tiny.onnx")
    logits = tmp_path / "logits.npy"
    command = [sys.executable, "-m", "benchmarks.memory.changed_session", change, str(graph), "128", str(logits)]
    opened, own, peak = map(float, subprocess.check_output(command, cwd=ROOT, text=True).split())
    assert 10 < opened < peak
    assert 10 < own < peak
    assert np.isfinite(np.load(logits)).all()
