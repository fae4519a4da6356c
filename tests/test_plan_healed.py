"""Where a model is healed, plans are judged by what they lose after a short training."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.models import open_prepared, recipe_of
from support.planning import nothing, planner_of

from kvslim.calibrate.statistics import CalibrationStatistics
from kvslim.errors import GateError
from kvslim.healing.schedule import LEAST_STEPS
from kvslim.planning.choose import choose
from kvslim.planning.decide import planned
from kvslim.planning.healed import LOOSER, TRIED, least_healed, smallest_healed
from kvslim.planning.planner import Planned, Planner
from kvslim.prepared import decoder_trials
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.prepared.fitted import TRIAL, shortened
from kvslim.settings import MARGIN, Budget, Heal
from kvslim.types import Healing, Plan, PlanPoint

RATIO = 10


@pytest.fixture(scope="module")
def planner(prepared: PreparedDecoder, statistics: CalibrationStatistics) -> Planner:
    """Expects little to be lost by windows, removals and shared caches; what they do lose is measured."""
    made_up = (lambda _: 1e-4, nothing)
    return planner_of(prepared, statistics, windows=made_up, plans=made_up)


def test_kinds_of_plans_differ_in_what_they_do_to_layers(planner: Planner) -> None:
    kinds = planner.kinds(planner.plain_bytes / RATIO)
    kls = [found.point.kl for found in kinds.values()]
    assert kls == sorted(kls)
    for kind, found in kinds.items():
        assert found.point.kv_ratio >= RATIO
        layers = found.plan.layers
        assert ("removals" in kind) == any(layer.heads is not None for layer in layers)
        assert ("sharing" in kind) == any(layer.source is not None for layer in layers)
        assert ("windows" in kind) == any(layer.has_cache and layer.cache.kept is not None for layer in layers)
    assert len(kinds) > 1


KINDS = {frozenset({name}): kl for name, kl in (("windows", 1.0), ("removals", 1.2), ("sharing", 2.0))}


@pytest.mark.parametrize(
    ("after", "taken"), [({1.2: 0.5}, 1.2), ({1.2: 0.9, 1.0: 0.8}, 1.0), ({2.0: 0.1}, 1.0), ({1.1: 0.2}, 1.1)]
)
def test_plan_that_loses_least_once_it_is_healed_is_taken(after: dict[float, float], taken: float) -> None:
    """Three plans are trained at most, that of least KL among them, and of its kind no other."""
    planner = object.__new__(Planner)
    today = found_at(8, 1.1)
    planner.kinds = lambda _: {frozenset(): found_at(8, 1.15)} | {kind: found_at(8, kl) for kind, kl in KINDS.items()}
    tried: list[float] = []

    def healed(planned: Planned) -> tuple[Planned, float]:
        tried.append(planned.point.kl)
        return planned, after.get(planned.point.kl, planned.point.kl)

    best, kl = least_healed(planner, today, 1.0, healed)
    assert tried == [1.1, 1.0, 1.2]
    assert (best.point.kl, kl) == (taken, after.get(taken, taken))


def test_without_healing_or_gain_the_plan_is_that_of_least_kl(planner: Planner) -> None:
    today = choose(planner, Budget(kv_ratio=RATIO), nothing)
    assert choose(planner, Budget(kv_ratio=RATIO), nothing, healed=lambda plan: (plan, plan.point.kl)) == today


def test_limit_of_kl_is_judged_after_healing(planner: Planner) -> None:
    today = choose(planner, Budget(kv_ratio=RATIO), nothing).planned
    limits = Budget(kv_ratio=RATIO, max_kl=today.point.kl / MARGIN / 2)
    with pytest.raises(GateError, match="KL is about"):
        choose(planner, limits, nothing)
    halved = choose(planner, limits, nothing, healed=lambda plan: (plan, plan.point.kl / 2)).planned
    assert halved.point.kv_ratio >= RATIO
    with pytest.raises(GateError, match="KL is about"):
        choose(planner, limits, nothing, healed=lambda plan: (plan, plan.point.kl))


def found_at(ratio: float, kl: float) -> Planned:
    point = PlanPoint(cache="int4", kv_bytes_per_token=1024 / ratio, kv_ratio=ratio, time_ratio=0.9, kl=kl)
    return Planned(Plan(layers=()), point)


@pytest.mark.parametrize(("left", "ratio"), [(0.6, 12), (0.8, 10), (1.0, 8)])
def test_smaller_cache_is_taken_where_healing_brings_it_within_the_kl(left: float, ratio: float) -> None:
    limit = 0.04
    planner = object.__new__(Planner)
    planner.context = 8
    planner._by_bits = lambda _: []  # type: ignore[assignment, method-assign]
    planner.never_worse = lambda planned: planned  # type: ignore[method-assign]
    frontier = [
        found_at(8, limit / MARGIN),
        found_at(10, LOOSER[1] * limit / MARGIN),
        found_at(12, 1.5 * limit / MARGIN),
    ]
    found = smallest_healed(planner, limit, frontier, lambda planned: (planned, left * planned.point.kl))
    assert found.point.kv_ratio == ratio


def test_training_that_compares_is_a_share_of_the_whole() -> None:
    assert shortened(Heal(steps=40 * TRIAL)) == Heal(steps=40)
    assert shortened(Heal(steps=8)) == Heal(steps=LEAST_STEPS)
    assert shortened(Heal(minutes=10)) == Heal(minutes=10 / TRIAL)


@pytest.mark.parametrize("compensate", [False, True])
def test_recipe_with_budget_and_healing_tries_plans_by_short_trainings(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, compensate: bool
) -> None:
    recipe = recipe_of().model_copy(update={"budget": Budget(kv_ratio=RATIO), "compensate": compensate})
    trained: list[tuple[Plan, Heal, Healing]] = []
    heal = decoder_trials.heal

    def noting(prepared: PreparedDecoder, fitted: object, settings: Heal) -> object:
        after, healing = heal(prepared, fitted, settings)  # type: ignore[arg-type]
        trained.append((after.plan, settings, healing))
        return after, healing

    monkeypatch.setattr(decoder_trials, "heal", noting)
    plain = planned(open_prepared(tiny_llama, recipe))
    assert trained == []
    summary = planned(open_prepared(tiny_llama, recipe.model_copy(update={"heal": Heal(steps=16, rate=1e-2)})))
    assert 1 <= len(trained) <= TRIED
    assert all(healing.steps <= LEAST_STEPS == settings.steps for _, settings, healing in trained)
    assert summary.plan in [plan for plan, _, _ in trained]
    assert summary.plan == plain.plan or len(trained) > 1
