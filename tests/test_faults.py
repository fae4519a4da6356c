"""What is wrong in plain data is said in the same words wherever it is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_artifact import fill

from kvslim import api
from kvslim.cli.baseline import read_baseline
from kvslim.cli.inputs import read_budget, read_gates, read_plan
from kvslim.devices.profile import load_device
from kvslim.errors import KvslimError
from kvslim.export.manifest import MANIFEST, read_manifest
from kvslim.recipe import parse_recipe
from kvslim.sweep.asked import read_sweep
from kvslim.validation.tasks import read_lines


def recipe(data: dict[str, Any], _: Path) -> None:
    parse_recipe({"name": "mine", **data}, where="mine.yaml")


def sweep(data: dict[str, Any], folder: Path) -> None:
    read_sweep(written(folder / "sweep.yaml", {"models": ["demo"], "recipes": ["lossless"], **data}))


def plan(data: dict[str, Any], folder: Path) -> None:
    read_plan(written(folder / "plan.json", {"layers": [], **data}))


def device(data: dict[str, Any], folder: Path) -> None:
    load_device(str(written(folder / "mine.yaml", {**load_device("laptop-8gb").model_dump(mode="json"), **data})))


def manifest(data: dict[str, Any], folder: Path) -> None:
    fill(folder)
    read_manifest(written(folder / MANIFEST, {**json.loads((folder / MANIFEST).read_text()), **data}).parent)


def gates(data: dict[str, Any], _: Path) -> None:
    api.validate("gone", gates=data)


def written(path: Path, data: dict[str, Any]) -> Path:
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize("read", [recipe, sweep, plan, device, manifest, gates])
def test_key_that_is_unknown_is_named_as_such(read: Callable[[dict[str, Any], Path], None], tmp_path: Path) -> None:
    with pytest.raises(KvslimError) as error:
        read({"surprise": 3}, tmp_path)
    assert error.value.message.endswith("surprise: no such key")


@pytest.mark.parametrize(
    ("read", "fault", "said"),
    [
        (recipe, {"methods": 3}, "methods: must be a list"),
        (recipe, {"gates": 3}, "gates: must be keys with values"),
        (recipe, {"compensate": "perhaps"}, "interpret input (got 'perhaps')"),
        (sweep, {"budgets": [{"kv_ratio": 0.5}]}, "budgets.0.kv_ratio: input should be greater than 1 (got 0.5)"),
        (sweep, {"recipes": []}, "sweep: give recipes or budgets"),
        (plan, {"layers": [{}]}, "layers.0.layer: must be given"),
        (device, {"name": 3}, "name: input should be a valid string (got 3)"),
        (gates, {"max_kl": -1}, "max_kl: input should be greater than or equal to 0 (got -1)"),
    ],
)
def test_value_that_is_wrong_is_told_with_what_it_should_be(
    read: Callable[[dict[str, Any], Path], None], fault: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(KvslimError) as error:
        read(fault, tmp_path)
    assert error.value.message.endswith(said)


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda _: read_gates(["max_kl=-1"]), "input should be greater than or equal to 0 (got '-1')"),
        (lambda _: read_budget(0.5, None, None, None, None), "input should be greater than 1 (got 0.5)"),
        (lambda _: read_budget(8, "1k=4", None, None, None), "give --kv-ratio or --kv-mib-at, not both"),
        (lambda folder: read_baseline(written(folder / "b.json", {})), "artifacts: must be keys with values"),
        (lambda folder: read_lines(written(folder / "t.jsonl", {"prompt": 3})), "answer: must be given"),
    ],
)
def test_option_or_file_is_told_in_the_same_words(read: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    with pytest.raises(KvslimError) as error:
        read(tmp_path)
    assert said in error.value.message
