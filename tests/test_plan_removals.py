"""Heads that the planner may remove, and the time that it keeps to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from support.numbers_of_a_model import SPEC, statistics_of
from support.planning import much, nothing, planner_of

from kvslim.caches import FullCache, WindowCache
from kvslim.calibrate.statistics import CalibrationStatistics
from kvslim.checks import check_plan
from kvslim.cli import app
from kvslim.errors import GateError
from kvslim.planning.allocate import Option, allocate, allocate_both
from kvslim.planning.budget import decode_time
from kvslim.planning.candidates import Alteration
from kvslim.planning.choose import choose
from kvslim.planning.decode_time import OF_CACHE, OF_SCORE, OF_WEIGHTS, DecodeTime
from kvslim.planning.planner import Planner
from kvslim.planning.removals import removals, removals_keeping_recall, spare_layers
from kvslim.planning.sharing import nearest_sources, sharing, sharing_keeping_recall
from kvslim.planning.trials import PlanTrials, keeping_recall
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.settings import Budget
from kvslim.types import KVLayout, LayerPlan, Plan

CONTEXT = 2048
BASE = Plan.identity(SPEC)
Loss = Callable[[Plan], float]


def changed_in(plan: Plan) -> list[LayerPlan]:
    return [layer for layer in plan.layers if layer != LayerPlan(layer=layer.layer)]


@pytest.fixture(scope="module")
def planner_with(prepared: PreparedDecoder, statistics: CalibrationStatistics) -> Callable[..., Planner]:
    def made(divergence: Loss, drop: Loss = nothing, time_ratio: float | None = None) -> Planner:
        return planner_of(prepared, statistics, context=CONTEXT, plans=(divergence, drop), time_ratio=time_ratio)

    return made


def test_both_limits_are_kept_and_none_is_wasted() -> None:
    """Bytes and time pull to different options; with both limited the mixture is found."""
    options = [Option(4, 0.0, 0, 4), Option(1, 1.0, 1, 4), Option(4, 1.0, 2, 1), Option(1, 3.0, 3, 1)]
    layers = [options] * 4
    for budget, time in [(16, 16), (7, 16), (16, 7), (10, 10), (7, 7), (4, 4)]:
        taken = allocate_both(layers, budget, time)
        assert taken is not None
        assert sum(option.size for option in taken) <= budget
        assert sum(option.time for option in taken) <= time
    losses = {
        limits: sum(o.loss for o in allocate_both(layers, *limits) or ()) for limits in [(16, 16), (7, 16), (4, 4)]
    }
    assert losses == {(16, 16): 0.0, (7, 16): 3.0, (4, 4): 12.0}
    assert allocate_both(layers, 3, 16) is None
    assert allocate_both(layers, 16, 3) is None


def test_time_that_limits_nothing_changes_nothing() -> None:
    layers = [[Option(size, 1 / size, place, size) for place, size in enumerate((1.0, 2.0, 5.0))]] * 3
    assert allocate_both(layers, 9, 1e9) == allocate(layers, 9)


def test_removals_are_tried_where_their_share_of_fluctuation_could_pay() -> None:
    statistics = statistics_of(SPEC)
    asked: list[LayerPlan] = []

    def divergence(plan: Plan) -> float:
        (layer,) = changed_in(plan)
        asked.append(layer)
        return float(SPEC.q_heads - len(layer.heads or ()))

    def pays(alteration: Alteration) -> bool:
        return asked[-1].layer == 1 and alteration.loss < SPEC.q_heads

    trials = PlanTrials(BASE, divergence, nothing)
    found = {
        layer: tried
        for layer in spare_layers(statistics, timed=False)
        if (tried := removals(layer, SPEC, statistics, trials, pays, timed=False))
    }
    assert list(found) == [1]
    assert [layer.layer for layer in asked if layer.heads == ()] == list(range(SPEC.layers))
    assert {layer.layer for layer in asked if layer.heads} == {1}
    parts = [alteration.heads or () for alteration in found[1]]
    assert all(0 < len(heads) < SPEC.q_heads for heads in parts)
    assert [alteration.share for alteration in found[1]] == [len(heads) / SPEC.q_heads for heads in parts]
    assert [alteration.loss for alteration in found[1]] == [SPEC.q_heads - len(heads) for heads in parts]


@pytest.mark.parametrize("timed", [False, True])
def test_feed_forward_parts_are_tried_where_time_is_limited(timed: bool) -> None:
    trials, statistics = PlanTrials(BASE, lambda _: 0.1, nothing), statistics_of(SPEC)
    for layer in range(SPEC.layers):
        found = removals(layer, SPEC, statistics, trials, lambda _: True, timed=timed)
        assert (Alteration(mlp=False, loss=0.1) in found) == timed
        assert (Alteration(heads=(), mlp=False, loss=0.1, share=0.0) in found) == timed


def test_removals_that_cost_recall_are_not_offered() -> None:
    def drop(plan: Plan) -> float:
        return 0.2 * (0 in [layer.layer for layer in changed_in(plan)])

    trials, order = PlanTrials(BASE, lambda _: 0.1, drop), range(SPEC.layers)
    found = {layer: removals(layer, SPEC, statistics_of(SPEC), trials, lambda _: True, timed=False) for layer in order}
    assert all(found.values())
    assert set(removals_keeping_recall(found, order, trials)) == set(range(1, SPEC.layers))


def test_attention_that_loses_nothing_goes_first(
    prepared: PreparedDecoder, planner_with: Callable[..., Planner]
) -> None:
    planner = planner_with(lambda plan: 0.0 if plan.layers[1].heads == () else 1e9)
    layers = planner._filled(planner.plain_bytes / 12, planner.offered[4][1])
    assert layers is not None
    assert layers[1].heads == ()
    planned = planner._planned(layers)
    check_plan(planned.plan, prepared.spec)
    assert "attention removed" in planned.plan.layers[1].reason
    assert planned.point.kv_bytes_per_token * CONTEXT == KVLayout.of(prepared.spec, planned.plan).bytes_at(CONTEXT)
    # What the layer does not take, the others have.
    whole = planner._filled(planner.plain_bytes / 12, planner.offered[4][0])
    assert whole is not None
    widths = [[layer.cache.widths(16) for layer in filled] for filled in (layers, whole)]  # type: ignore[attr-defined]
    assert all(more > less for index, (more, less) in enumerate(zip(*widths, strict=True)) if index != 1)


def test_plan_is_no_worse_than_one_with_all_heads(planner_with: Callable[..., Planner]) -> None:
    misled, whole = planner_with(nothing), planner_with(much)
    for ratio in (8, 14):
        plans = [planner.allocated(planner.plain_bytes / ratio) for planner in (misled, whole)]
        assert plans[0] is not None
        assert plans[1] is not None
        assert plans[0].point.kl <= plans[1].point.kl


@pytest.mark.parametrize("time_ratio", [0.9, 0.75])
def test_plan_keeps_time_and_bytes(
    prepared: PreparedDecoder, planner_with: Callable[..., Planner], time_ratio: float
) -> None:
    planner = planner_with(lambda _: 0.05, time_ratio=time_ratio)
    alone = choose(planner, Budget(time_ratio=time_ratio), lambda _: 0.0).planned
    assert alone.point.time_ratio <= time_ratio
    both = choose(planner, Budget(time_ratio=time_ratio, kv_ratio=8), lambda _: 0.0).planned
    assert both.point.time_ratio <= time_ratio
    assert both.point.kv_ratio >= 8
    for planned in (alone, both):
        check_plan(planned.plan, prepared.spec)
        work = decode_time(prepared, CONTEXT)
        plain = work.of_plan(Plan.identity(prepared.spec).layers)
        assert planned.point.time_ratio == pytest.approx(work.of_plan(planned.plan.layers) / plain)


def test_impossible_time_is_refused_with_what_is_possible(planner_with: Callable[..., Planner]) -> None:
    planner = planner_with(much, time_ratio=0.01)
    with pytest.raises(GateError) as caught:
        choose(planner, Budget(time_ratio=0.01), lambda _: 0.0)
    assert caught.value.where == "--time-ratio, budget.time_ratio"
    assert f"{planner.least_time_ratio + 0.005:.2f}" in (caught.value.fix or "")


def test_time_follows_heads_sizes_and_windows() -> None:
    spec = SPEC.model_copy(update={"windows": (None,) * SPEC.layers})
    time = DecodeTime(spec, CONTEXT, "fp32", (100,) * spec.layers, (1000,) * spec.layers, 10)
    reading, of_int8 = (
        spec.q_heads * (OF_CACHE[kind] * 2 * spec.head_dim + OF_SCORE) * CONTEXT for kind in ("float32", "int8")
    )
    assert time.of_layer(LayerPlan(layer=0)) == OF_WEIGHTS["fp32"] * 1100 + reading
    assert time.of_layer(LayerPlan(layer=0, heads=())) == OF_WEIGHTS["fp32"] * 1000
    assert time.of_layer(LayerPlan(layer=0, cache=FullCache(stored="int8"))) == OF_WEIGHTS["fp32"] * 1100 + of_int8
    windowed = LayerPlan(layer=0, cache=WindowCache(window=100, sinks=4))
    assert time.of_layer(windowed) == OF_WEIGHTS["fp32"] * 1100 + reading * 104 / CONTEXT
    assert time.of_layer(LayerPlan(layer=0, mlp=False)) == OF_WEIGHTS["fp32"] * 100 + reading
    half = LayerPlan(layer=0, heads=tuple(range(spec.q_heads // 2)))
    assert time.of_layer(half) == OF_WEIGHTS["fp32"] * 1050 + reading / 2


def test_time_ratio_is_an_option_of_plan(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("--set", "calibration.samples=4", "--set", "calibration.length=48")
    assert app.run(["plan", str(tiny_llama), "--time-ratio", "0.9", *settings]) == 0
    assert "time" in capsys.readouterr().out
    assert app.run(["plan", str(tiny_llama), "--time-ratio", "1.5", *settings]) == 2
    assert "--time-ratio" in capsys.readouterr().err


def test_shared_caches_form_no_chain_and_keep_recall(
    prepared: PreparedDecoder, statistics: CalibrationStatistics
) -> None:
    spec, base = prepared.spec, Plan.identity(prepared.spec)
    sources = nearest_sources(spec, statistics, base)

    def offered(drop: Loss, pays: bool) -> dict[int, Alteration | None]:
        trials = PlanTrials(base, lambda _: 0.1, drop)
        found = {layer: sharing(layer, source, trials, lambda _: pays) for layer, source in sources.items()}
        return {layer: found[layer] for layer in sharing_keeping_recall(found, sources, trials)}

    found = offered(nothing, pays=True)
    assert found
    assert not {sources[layer] for layer in found} & set(found)
    expected = {layer: Alteration(source=sources[layer], loss=0.1, share=0.0) for layer in found}
    assert found == expected
    kept = offered(lambda plan: 0.5 * (plan.layers[-1].source is not None), pays=True)
    assert set(kept) == set(found) - {spec.layers - 1}
    assert offered(nothing, pays=False) == {}


def test_changes_that_keep_recall_are_taken_at_once() -> None:
    asked: list[list[int]] = []

    def drop(layers: Sequence[int]) -> float:
        asked.append(list(layers))
        return 0.0

    assert keeping_recall(range(5), drop) == [0, 1, 2, 3, 4]
    assert asked == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("forgetful", [{0}, {3}, {1, 4}, set(range(5))])
def test_layers_that_recall_needs_stay_as_they_are(forgetful: set[int]) -> None:
    def drop(layers: Sequence[int]) -> float:
        return 0.5 * bool(forgetful & set(layers))

    assert set(keeping_recall([4, 2, 0, 1, 3], drop)) == set(range(5)) - forgetful


def test_long_rows_are_taken_apart_down_to_an_eighth() -> None:
    asked: list[Sequence[int]] = []

    def drop(layers: Sequence[int]) -> float:
        asked.append(layers)
        return 0.5 * (5 in layers)

    assert keeping_recall(range(16), drop) == [*range(4), *range(6, 16)]
    assert len(asked) == 7


def test_changes_that_cost_recall_only_together_are_not_all_taken() -> None:
    assert keeping_recall([5, 3, 1, 0, 2, 4], lambda layers: 0.1 * (len(layers) > 4)) == [5, 3, 1, 0]
