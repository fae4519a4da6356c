"""The cache folder: each kind of what is kept has a limit, and what was used least lately goes first."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvslim.calibrate import cache
from kvslim.prepared import fitted
from kvslim.settings import Heal
from kvslim.transform.edits import FittedPlan, LayerEdit
from kvslim.types import Plan

TOKENS = np.zeros((1, 64), np.int64)  # 640 bytes as a file


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVSLIM_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "LIMIT", 1_400)
    return tmp_path


def heal(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training whose best weights take 640 bytes."""

    def healed(*arguments: Any) -> tuple[Any, None]:
        codes, reached = arguments[2], arguments[6]
        reached.mkdir(parents=True, exist_ok=True)
        (reached / "state.safetensors").write_bytes(bytes(640))
        return codes, None

    monkeypatch.setattr(fitted, "healed", healed)
    monkeypatch.setattr(fitted, "parts_of", lambda windows: windows)
    text = SimpleNamespace(identity=number, healing_windows=lambda _: None)
    recipe = SimpleNamespace(calibration=SimpleNamespace(seed=0))
    prepared: Any = SimpleNamespace(
        text=text, recipe=recipe, made_for="model", device_model=None, architecture=None, progress=None
    )
    fitted.heal(prepared, FittedPlan(Plan(layers=()), (LayerEdit(),), "model"), Heal(steps=8))


@pytest.mark.parametrize(
    ("kind", "keep"),
    [
        ("texts", lambda number, _: cache.store_windows(str(number), TOKENS)),
        ("healing", heal),
    ],
)
def test_what_was_used_least_lately_goes_when_the_limit_is_passed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, keep: Callable[[int, pytest.MonkeyPatch], None]
) -> None:
    made: list[Path] = []
    for number in range(3):
        keep(number, monkeypatch)
        made += [entry for entry in (folder / kind).iterdir() if entry not in made]
        os.utime(made[-1], (1_000 + number, 1_000 + number))
    assert [entry.exists() for entry in made] == [False, True, True]
    keep(1, monkeypatch)  # used again, so the third is older now
    keep(3, monkeypatch)
    assert [entry.exists() for entry in made] == [False, True, False]


def test_text_that_is_read_counts_as_used(folder: Path) -> None:
    for number in range(2):
        cache.store_windows(str(number), TOKENS)
        os.utime(folder / "texts" / f"{number}.npy", (1_000 + number, 1_000 + number))
    assert cache.load_windows("0") is not None
    cache.store_windows("2", TOKENS)
    assert {path.stem for path in (folder / "texts").iterdir()} == {"0", "2"}


def test_last_one_stays_whatever_it_takes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LIMIT", 100)
    cache.store_windows("large", TOKENS)
    assert (folder / "texts" / "large.npy").exists()
