"""Attention that goes: chosen greedily by what is measured, at the ends protected, and told apart from heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from models import recipe_of
from numbers_of_a_model import SPEC, statistics_of
from pydantic import ValidationError

from kvslim import pipeline
from kvslim.checks import check_layout, check_plan
from kvslim.errors import UsageError
from kvslim.methods import KvHdc, PruneHeads, PruneLayers
from kvslim.runtime.graph import layout_of, open_session
from kvslim.types import KVLayout, Plan

DEEP = SPEC.model_copy(update={"layers": 6, "windows": (None,) * 6})


def test_layers_go_one_by_one_with_the_loss_measured_again() -> None:
    """Layers 1 and 2 are spare alone, but stand in for each other."""
    asked: list[tuple[int, ...]] = []

    def divergence(gone: tuple[int, ...]) -> float:
        asked.append(gone)
        return sum({1: 0.1, 2: 0.2, 3: 0.5, 4: 0.9}[layer] for layer in gone) + 5.0 * ({1, 2} <= set(gone))

    method = PruneLayers(attention=2).chosen(DEEP, divergence, iter)
    assert method.layers == (1, 3)
    assert asked == [(1,), (2,), (3,), (4,), (1, 2), (1, 3), (1, 4)]


@pytest.mark.parametrize(("protect", "free"), [(0, {0, 1, 2, 3, 4, 5}), (1, {1, 2, 3, 4}), (2, {2, 3})])
def test_ends_are_protected(protect: int, free: set[int]) -> None:
    method = PruneLayers(attention=1, protect=protect)
    asked: list[int] = []
    method.chosen(DEEP, lambda gone: float(asked.append(gone[-1]) or 0), iter)  # type: ignore[func-returns-value]
    assert set(asked) == free


def test_plan_has_no_cache_for_layers_without_attention() -> None:
    plan = PruneLayers(layers=(1, 4)).decide(DEEP, statistics_of(DEEP), Plan.identity(DEEP))
    check_plan(plan, DEEP)
    assert sorted({tensor.layer for tensor in KVLayout.of(DEEP, plan).tensors}) == [0, 2, 3, 5]
    assert "attention removed" in plan.layers[4].reason


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({}, "not what to remove"),
        ({"attention": 5}, "too many"),
        ({"layers": [6]}, "not a layer 6"),
        ({"layers": [-1]}, "not a layer -1"),
        ({"layers": [0, 1, 2, 3, 4, 5]}, "too many"),
        ({"attention": 1, "protect": 3}, "too many"),
    ],
)
def test_layers_that_cannot_go_are_refused(options: dict[str, object], fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        PruneLayers.model_validate(options).check(DEEP)


@pytest.mark.parametrize("options", [{"attention": 1, "layers": [1]}, {"attention": 0}, {"protect": -1}])
def test_options_that_contradict_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PruneLayers.model_validate(options)


def test_counted_heads_are_refused_beside_layers_that_may_go() -> None:
    with pytest.raises(UsageError, match="cannot count on the heads"):
        check_layout(recipe_of([PruneLayers(attention=1), PruneHeads(groups=1)]))
    check_layout(recipe_of([PruneLayers(attention=1), PruneHeads(heads={0: (0, 1)})]))


def test_compress_measures_drops_and_keeps_its_plan(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = str(tiny_model("qwen3"))
    recipe = recipe_of([PruneLayers(attention=1, protect=0), KvHdc(bits=4)])
    summary = pipeline.plan(model, recipe)
    dropped = [layer.layer for layer in summary.plan.layers if layer.heads == ()]
    assert len(dropped) == 1
    manifest = pipeline.compress(model, recipe, tmp_path / "out", plan=summary.plan)
    layout = layout_of(open_session(tmp_path / "out"))
    assert layout == manifest.kv_layout
    assert {tensor.layer for tensor in layout.tensors} == {0, 1} - set(dropped)
    assert manifest.report is not None
    assert manifest.report.artifact.kv_bytes_per_token == summary.kv_bytes_per_token
