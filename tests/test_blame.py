"""A recipe that cannot be read: the `--set` that is wrong is blamed, or else the file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvslim.errors import UsageError
from kvslim.recipe import load_recipe


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


BLAMED = {
    "a key that is unknown": (
        ["calibration.sampels=3"],
        "--set calibration.sampels=3",
        "calibration.sampels: no such key",
    ),
    "a value out of range": (["validation.samples=1"], "--set validation.samples=1", "greater than or equal to 2"),
    "a value of another type": (["compensate=perhaps"], "--set compensate=perhaps", "compensate: input should be"),
    "an option of a method": (["methods.kv_quant.bits=5"], "--set methods.kv_quant.bits=5", "methods.kv_quant.bits:"),
    "the second of two": (["weights=int4", "layout=gqq"], "--set layout=gqq", "layout: input should be"),
    "a method that is unknown": (["methods=[kv_quand]"], "--set methods=[kv_quand]", "unknown method"),
    "two that do not go together": (
        ["weights.type=int8", "weights.mixed=true"],
        "--set weights.type=int8 --set weights.mixed=true",
        "mixed goes with type int4",
    ),
    "one behind others that need each other": (
        ["methods=[]", "budget={kv_ratio: 4}", "calibration.length=1"],
        "--set calibration.length=1",
        "greater than or equal to 8 (got 1)",
    ),
    "one before others that need each other": (
        ["validation.seed=-1", "methods=[kv_pca]", "methods.kv_pca.rank=8"],
        "--set validation.seed=-1",
        "greater than or equal to 0 (got -1)",
    ),
    "two of many that contradict each other": (
        ["calibration.samples=4", "positions=100", "calibration.context=4096", "weights=int4"],
        "--set positions=100 --set calibration.context=4096",
        "recipe: positions are fewer than calibration.context",
    ),
    "two that are wrong": (
        ["layout=gqq", "validation.samples=1"],
        "--set layout=gqq --set validation.samples=1",
        "layout: input should be",
    ),
    "weights that are unknown": (
        ["weights=int3"],
        "--set weights=int3",
        "should be 'fp32', 'int8', 'int4', 'stored' or 'auto'",
    ),
    "two that fail only together": (
        ["methods=[]", "budget={kv_mib: 4, context: 64, kv_ratio: 2}"],
        "--set budget={kv_mib: 4, context: 64, kv_ratio: 2}",
        "kv_ratio or kv_mib, not both",
    ),
}


@pytest.mark.parametrize("name", BLAMED)
def test_wrong_set_is_blamed_on_itself(name: str) -> None:
    overrides, where, words = BLAMED[name]
    with pytest.raises(UsageError, match=re.escape(words)) as error:
        load_recipe("lossless", overrides)
    assert error.value.where == where


def test_sets_that_fail_together_are_named_together() -> None:
    overrides = ["methods=[]", "methods.kv_pca.rank=8"]
    Path("mine.yaml").write_text("methods: [{kv_pca: {rank: 16}}]")
    with pytest.raises(UsageError, match="no method 'kv_pca'") as error:
        load_recipe("mine.yaml", overrides)
    assert error.value.where == "--set methods=[] --set methods.kv_pca.rank=8"


def test_file_is_blamed_for_its_own_faults_and_mended_by_a_set() -> None:
    Path("mine.yaml").write_text("methods: [{kv_quant: {bits: 3}}]")
    with pytest.raises(UsageError, match=r"methods\.kv_quant\.bits") as error:
        load_recipe("mine.yaml", ["calibration.samples=8"])
    assert error.value.where == "mine.yaml"
    assert load_recipe("mine.yaml", ["methods.kv_quant.bits=4"]).methods
