"""Text that the model writes itself: with one copy of it in memory, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.models import CALIBRATION, open_prepared, recipe_of

from kvslim.errors import UsageError
from kvslim.methods.kv_quant import KvQuant
from kvslim.prepared import text
from kvslim.prepared.base import texts_for
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.settings import Heal, TextUse
from kvslim.transform.edits import FittedPlan
from kvslim.types import Plan

RECIPE = recipe_of([KvQuant()], "int8")


def opened(model: Path, *texts: TextUse) -> PreparedDecoder:
    return open_prepared(model, RECIPE, *texts)


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[bool]:
    """For each time that a model writes, whether it is in torch's memory as well."""
    monkeypatch.setenv("KVSLIM_CACHE", str(tmp_path / "cache"))
    found: list[bool] = []
    free, write = PreparedDecoder.free, text.self_windows
    is_freed: list[bool] = []

    def freeing(prepared: PreparedDecoder) -> None:
        free(prepared)
        is_freed.append("model" not in vars(prepared))

    def writing(*arguments: Any, **options: Any) -> list[np.ndarray]:
        found.append(not is_freed or not is_freed[-1])
        return write(*arguments, **options)

    monkeypatch.setattr(PreparedDecoder, "free", freeing)
    monkeypatch.setattr(text, "self_windows", writing)
    return found


def test_texts_are_written_before_the_model_is_in_memory_and_once(tiny_llama: Path, writers: list[bool]) -> None:
    first = opened(tiny_llama, "calibration", "validation")
    windows = first.text.calibration_windows, first.text.held_out_windows
    assert writers == [False]  # both texts at once
    again = opened(tiny_llama, "calibration", "validation")
    found = again.text.calibration_windows, again.text.held_out_windows
    assert writers == [False]
    for before, after in zip(windows, found, strict=True):
        np.testing.assert_array_equal(before, after)


def test_text_that_nobody_asked_for_is_written_when_it_is_needed(tiny_llama: Path, writers: list[bool]) -> None:
    """By the model as its files say it, though its weights are rounded by then."""
    late = opened(tiny_llama)
    assert writers == []
    windows = late.text.calibration_windows
    assert writers == [True]
    early = opened(tiny_llama, "calibration")
    np.testing.assert_array_equal(early.text.calibration_windows, windows)


def test_text_too_short_to_heal_on_is_refused_before_anything_is_fitted(
    tiny_llama: Path, writers: list[bool], tmp_path: Path
) -> None:
    short = RECIPE.model_copy(update={"heal": Heal(steps=2)})
    own = short.model_copy(update={"calibration": CALIBRATION.model_copy(update={"samples": 2})})
    (tmp_path / "text.txt").write_text("a" * 2 * CALIBRATION.length)
    given = CALIBRATION.model_copy(update={"source": str(tmp_path / "text.txt")})
    for recipe in (own, short.model_copy(update={"calibration": given})):
        with pytest.raises(UsageError, match="3 windows of text, and there are 2"):
            open_prepared(tiny_llama, recipe, "calibration")
        open_prepared(tiny_llama, recipe.model_copy(update={"heal": None}), "calibration")
    assert len(writers) == 1  # by the last, which heals not


def test_numbers_that_are_given_take_text_to_train_on_alone() -> None:
    given = FittedPlan(Plan(layers=()), (), "")
    healing = RECIPE.model_copy(update={"heal": Heal(steps=2)})
    assert texts_for(given, RECIPE) == ("validation",)
    assert texts_for(given, healing) == texts_for(given.plan, RECIPE) == texts_for(None, RECIPE)
    assert RECIPE.model_copy(update={"methods": (), "heal": Heal(steps=2)}).is_calibrated


def test_damaged_text_on_the_disk_is_written_again(tiny_llama: Path, writers: list[bool], tmp_path: Path) -> None:
    windows = opened(tiny_llama, "calibration").text.calibration_windows
    (stored,) = (tmp_path / "cache" / "texts").iterdir()
    stored.write_bytes(stored.read_bytes()[:40])
    np.testing.assert_array_equal(opened(tiny_llama, "calibration").text.calibration_windows, windows)
    assert writers == [False, False]
