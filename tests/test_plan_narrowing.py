"""Narrower feed-forward parts that the planner may choose for the time that they take."""

from __future__ import annotations

import pytest
from support.numbers_of_a_model import SPEC
from support.planning import nothing, planner_of

from kvslim.calibrate.statistics import CalibrationStatistics
from kvslim.checks import check_plan
from kvslim.planning.candidates import Alteration, altered, reason_of
from kvslim.planning.choose import choose
from kvslim.planning.narrowing import narrowing, narrowing_keeping_recall
from kvslim.planning.planner import Planner
from kvslim.planning.trials import PlanTrials
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.settings import Budget
from kvslim.types import LayerPlan, Plan

BASE = Plan.identity(SPEC)
WIDTH = 256


def gone(plan: Plan) -> float:
    """Each layer hurts by the channels that it lacks."""
    return sum(WIDTH - layer.mlp_width for layer in plan.layers if layer.mlp_width) / 1000


def test_a_quarter_is_tried_and_other_shares_where_they_could_pay() -> None:
    asked: list[int | None] = []

    def divergence(plan: Plan) -> float:
        asked.append(plan.layers[1].mlp_width)
        return gone(plan)

    trials = PlanTrials(BASE, divergence, nothing)
    found = narrowing(1, WIDTH, trials, lambda alteration: alteration.loss < 0.1)
    assert asked == [192, 224]
    assert found == (Alteration(width=192, loss=0.064), Alteration(width=224, loss=0.032))
    assert narrowing(1, WIDTH, trials, lambda alteration: alteration.loss > 0.1) == (Alteration(width=128, loss=0.128),)
    assert narrowing(1, 32, trials, lambda _: True) == ()  # a whole step is more than half of it


def test_layers_that_recall_needs_keep_their_channels() -> None:
    def drop(plan: Plan) -> float:
        return 0.5 * (plan.layers[0].mlp_width == 128)

    found = {layer: (Alteration(width=192), Alteration(width=128)) for layer in range(SPEC.layers)}
    trials = PlanTrials(BASE, gone, drop)
    every = tuple(range(SPEC.layers))
    assert narrowing_keeping_recall(found, trials) == {192: every, 128: every[1:]}
    assert narrowing_keeping_recall(found, PlanTrials(BASE, gone, lambda _: 0.5)) == {}


def test_part_that_is_gone_has_no_width() -> None:
    layer = LayerPlan(layer=0, mlp=False)
    assert altered(layer, Alteration(width=64)) == layer
    narrow = altered(LayerPlan(layer=0, score=0.1), Alteration(width=1024))
    assert "1,024 channels" in reason_of(narrow, SPEC)


def timed_planner(
    prepared: PreparedDecoder, statistics: CalibrationStatistics, time_ratio: float, loss: float
) -> Planner:
    """A planner that expects narrower parts to lose so much, and all else that it could remove to lose far more."""

    def divergence(plan: Plan) -> float:
        changed = [layer for layer in plan.layers if layer != LayerPlan(layer=layer.layer)]
        return loss if all(layer.mlp_width for layer in changed) else 1e3

    return planner_of(prepared, statistics, plans=(divergence, nothing), time_ratio=time_ratio)


@pytest.mark.parametrize("time_ratio", [0.8, 0.65])
@pytest.mark.parametrize("loss", [0.0, 0.3])
def test_narrower_parts_are_chosen_where_they_measure_better_alone(
    prepared: PreparedDecoder, statistics: CalibrationStatistics, time_ratio: float, loss: float
) -> None:
    budget = Budget(time_ratio=time_ratio)
    planner = timed_planner(prepared, statistics, time_ratio, loss)
    assert any(planner.narrower.values())
    found = {planned.point.cache: planned for planned in planner._by_bits(planner.plain_bytes)}
    chosen = choose(planner, budget, nothing).planned
    check_plan(chosen.plan, prepared.spec)
    assert chosen.point.time_ratio <= time_ratio
    planner.narrower = {bits: [] for bits in planner.narrower}
    whole = {planned.point.cache: planned for planned in planner._by_bits(planner.plain_bytes)}
    assert whole.keys() <= found.keys()
    for cache, planned in whole.items():
        assert found[cache].point.kl <= planned.point.kl


def test_time_that_whole_parts_cannot_keep_is_kept_by_narrower_ones(
    prepared: PreparedDecoder, statistics: CalibrationStatistics
) -> None:
    planner = timed_planner(prepared, statistics, 0.5, 0.01)
    print(planner.least_time_ratio)
