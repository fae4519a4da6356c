"""Narrower feed-forward parts that the planner may choose for the time that they take."""

from __future__ import annotations

import pytest
from support.numbers_of_a_model import SPEC
from support.planning import nothing, planner_of

from kvslim.calibrate.statistics import CalibrationStatistics
from kvslim.checks import check_plan
from kvslim.errors import GateError
from kvslim.planning.candidates import Alteration, altered, reason_of
from kvslim.planning.choose import choose
from kvslim.planning.narrowing import narrowing
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


def test_part_that_is_gone_has_no_width() -> None:
    layer = LayerPlan(layer=0, mlp=False)
    assert altered(layer, Alteration(width=64)) == layer
    narrow = altered(LayerPlan(layer=0, score=0.1), Alteration(width=1024))
    assert "1,024 channels" in reason_of(narrow, SPEC)


CONTEXT = 512


def timed_planner(
    prepared: PreparedDecoder, statistics: CalibrationStatistics, time_ratio: float, free: tuple[int, ...]
) -> Planner:
    """A planner that expects some layers to lose nothing by narrower parts, and any other removal to lose far more."""

    def divergence(plan: Plan) -> float:
        changed = [layer for layer in plan.layers if layer != LayerPlan(layer=layer.layer)]
        return 0.0 if all(layer.mlp_width and layer.layer in free for layer in changed) else 1e3

    plans = (divergence, nothing)
    return planner_of(prepared, statistics, context=CONTEXT, plans=plans, time_ratio=time_ratio)


def without_narrower(planner: Planner) -> dict[str, float]:
    """KL by type of the cache of the plans that have all feed-forward parts whole."""
    planner.narrower = {bits: [] for bits in planner.narrower}
    return kls(planner)


def kls(planner: Planner) -> dict[str, float]:
    return {planned.point.cache: planned.point.kl for planned in planner._by_bits(planner.plain_bytes)}


@pytest.mark.parametrize("time_ratio", [0.75, 0.7])
def test_plan_is_no_worse_than_one_with_whole_parts(
    prepared: PreparedDecoder, statistics: CalibrationStatistics, time_ratio: float
) -> None:
    """It expects half of all channels to be free, which they are not."""
    planner = timed_planner(prepared, statistics, time_ratio, (0, 1))
    found = kls(planner)
    assert any(layer.mlp_width for layers in planner._divergences for layer in layers)
    whole = without_narrower(planner)
    assert whole
    assert all(found[cache] <= kl for cache, kl in whole.items())


def test_narrower_part_is_taken_where_it_measures_better(
    prepared: PreparedDecoder, statistics: CalibrationStatistics
) -> None:
    planner = timed_planner(prepared, statistics, 0.75, (1,))
    chosen = choose(planner, Budget(time_ratio=0.75), nothing).planned
    check_plan(chosen.plan, prepared.spec)
    assert [layer.mlp_width is None for layer in chosen.plan.layers] == [True, False]
    assert "channels of the feed-forward part" in chosen.plan.layers[1].reason
    assert chosen.point.time_ratio <= 0.75
    assert chosen.point.kl < min(without_narrower(planner).values())


def test_time_that_whole_parts_cannot_keep_is_kept_by_narrower_ones(
    prepared: PreparedDecoder, statistics: CalibrationStatistics
) -> None:
    planner = timed_planner(prepared, statistics, 0.65, (0, 1))
    assert planner.least_time_ratio < 0.65
    assert choose(planner, Budget(time_ratio=0.65), nothing).planned.point.time_ratio <= 0.65
    assert without_narrower(planner) == {}
    with pytest.raises(GateError, match=r"no plan takes 0\.65"):
        choose(planner, Budget(time_ratio=0.65), nothing)


def test_widths_are_offered_where_time_is_limited_alone(
    prepared: PreparedDecoder, statistics: CalibrationStatistics
) -> None:
    planner = planner_of(prepared, statistics, plans=(nothing, nothing))
    assert not any(planner.narrower.values())
