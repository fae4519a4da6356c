"""Probes as a value: merged from parts, stored and loaded, and planned from without another measurement."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from support.models import open_prepared, recipe_of
from support.planning import nothing, planner_with, probed, prober_of

from kvslim.calibrate import cache
from kvslim.calibrate.statistics import CalibrationStatistics
from kvslim.errors import UsageError
from kvslim.planning.budget import choose_within, probes_key
from kvslim.planning.planner import Planner
from kvslim.planning.prices import Price
from kvslim.planning.probes import CHANGES, FORMAT, Change, Probes
from kvslim.planning.probing import Prober
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.settings import Budget
from kvslim.transform.edits import Codes
from kvslim.types import LayerPlan, Plan

CONTEXT = 128
LOSSES = {"key_encoder": 0.1, "value_encoder": 0.2}


def divergence(codes: Codes) -> float:
    """Each layer and side hurts by a number of its own."""
    sides = (
        (layer, side) for layer, code in enumerate(codes) for side in LOSSES if getattr(code.code, side) is not None
    )
    return sum(LOSSES[side] * (layer + 1) for layer, side in sides)


def altered(plan: Plan) -> float:
    """Each altered layer hurts a little, by a number of its own."""
    return sum(1e-4 * (layer.layer + 1) for layer in plan.layers if layer != LayerPlan(layer=layer.layer))


@pytest.fixture(scope="module")
def prober(prepared: PreparedDecoder, statistics: CalibrationStatistics) -> Prober:
    """Offers windows, removals and shared caches in every layer."""
    made_up = {"divergence": divergence, "windows": (nothing, nothing), "plans": (altered, nothing)}
    return prober_of(prepared, statistics, context=CONTEXT, key="all", **made_up)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def probes(prober: Prober) -> Probes:
    return probed(prober)


def parts_of(prober: Prober) -> list[Probes]:
    return [prober.probe_layer(layer) for layer in range(prober.spec.layers)]


def test_layers_probed_apart_make_the_probes_of_all(prober: Prober, probes: Probes) -> None:
    merged = Probes.merge(*reversed(parts_of(prober)))
    assert merged.unasked == list(CHANGES)
    assert probes.unasked == []
    assert prober.with_recall(merged) == probes
    assert probes.windowed
    assert probes.removed
    assert probes.shared


def test_probes_are_the_same_after_json(probes: Probes) -> None:
    assert Probes.model_validate_json(probes.model_dump_json()) == probes
    price = Price(energy=1e-12, kl=float("inf"), exponent=0.1 + 0.2, per_noise=1 / 3)
    assert Price.model_validate_json(price.model_dump_json()) == price


def test_parts_that_do_not_fit_together_are_refused(prober: Prober) -> None:
    first, second = parts_of(prober)[:2]
    with pytest.raises(UsageError, match="layer 0 is probed twice"):
        Probes.merge(first, second, first)
    for update in ({"key": "other"}, {"context": 64}, {"timed": True}):
        with pytest.raises(UsageError, match="different models or settings"):
            Probes.merge(first, second.model_copy(update=update))
    with pytest.raises(UsageError, match="no probes"):
        Probes.merge()
    with pytest.raises(UsageError, match="layer 0 is not probed"):
        prober.with_recall(second)


def test_planner_refuses_probes_of_something_else(
    prepared: PreparedDecoder, statistics: CalibrationStatistics, prober: Prober, probes: Probes
) -> None:
    with pytest.raises(UsageError, match="layer 1 is not probed"):
        planner_with(prepared, statistics, parts_of(prober)[0])
    more = probes.layers[-1].model_copy(update={"layer": len(probes.layers)})
    with pytest.raises(UsageError, match="the model has"):
        planner_with(prepared, statistics, probes.model_copy(update={"layers": (*probes.layers, more)}))
    with pytest.raises(UsageError, match="without a limit of time"):
        planner_with(prepared, statistics, probes, time_ratio=0.9)


def test_second_budget_measures_no_layer_again(
    prepared: PreparedDecoder, statistics: CalibrationStatistics, cache_of_its_own: Path
) -> None:
    asked: list[Codes] = []

    def heard(codes: Codes) -> float:
        asked.append(codes)
        return divergence(codes)

    probes = probed(prober_of(prepared, statistics, divergence=heard, key="heard"))
    # Two probes drop coordinates and one rounds, of each layer's keys and of its values.
    assert len(asked) == 6 * prepared.spec.layers
    cache.store_probes(probes)
    stored = cache.load_probes("heard", Probes)
    assert stored == probes
    planners = [planner_with(prepared, statistics, each) for each in (probes, stored)]
    for ratio in (6, 12):
        first, again = (planner.allocated(planner.plain_bytes / ratio) for planner in planners)
        assert first is not None
        assert first == again
    assert len(asked) == 6 * prepared.spec.layers


def test_recall_is_asked_of_a_kind_of_change_when_a_plan_first_has_it(
    prepared: PreparedDecoder, statistics: CalibrationStatistics
) -> None:
    """Windows lose nothing here, removals and shared caches far more than codes in a large cache."""
    losing = prober_of(
        prepared, statistics, context=CONTEXT, windows=(nothing, nothing), plans=(lambda _: 1e-3, nothing)
    )
    asked: list[Change] = []

    def with_recall(probes: Probes, changes: Iterable[Change]) -> Probes:
        asked.extend(changes)
        return losing.with_recall(probes, changes)

    whole = probed(losing)
    unasked = Probes.merge(*parts_of(losing))
    known = prepared.spec, statistics, Plan.identity(prepared.spec), losing.time
    planner, other = (
        Planner(*known, probes, with_recall, lambda codes: map(nothing, codes)) for probes in (unasked, whole)
    )
    assert asked == []
    for ratio, changes in ((4, []), (8, ["windows"]), (40, ["windows", "removals"])):
        assert planner.allocated(planner.plain_bytes / ratio) == other.allocated(planner.plain_bytes / ratio)
        assert asked == changes


@pytest.fixture
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVSLIM_CACHE", str(tmp_path))
    return tmp_path


def test_probes_come_from_the_disk_for_any_budget_and_are_made_again_when_damaged(
    tiny_llama: Path, cache_of_its_own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = open_prepared(tiny_llama, recipe_of()).trials()
    first = choose_within(Budget(kv_ratio=8), trials)
    (stored,) = (cache_of_its_own / "probes").iterdir()
    probed: list[int] = []
    probe = Prober.probe_layer
    monkeypatch.setattr(Prober, "probe_layer", lambda prober, layer: probed.append(layer) or probe(prober, layer))
    assert choose_within(Budget(kv_ratio=12), trials).planned.point.kv_ratio >= 12
    again = open_prepared(tiny_llama, recipe_of()).trials()
    assert choose_within(Budget(kv_ratio=8), again) == first
    assert "probe" not in vars(again)  # nor does its text pass through the model
    assert probed == []
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-100])
    assert cache.load_probes(stored.stem, Probes) is None
    assert choose_within(Budget(kv_ratio=8), trials) == first
    assert probed == list(range(trials.spec.layers))
    choose_within(Budget(kv_ratio=12), trials)  # may ask more of recall
    assert stored.read_bytes() == whole


def test_probes_of_another_key_or_format_are_not_taken(probes: Probes, cache_of_its_own: Path) -> None:
    cache.store_probes(probes)
    (stored,) = (cache_of_its_own / "probes").iterdir()
    (stored.parent / "moved.json").write_bytes(stored.read_bytes())
    assert cache.load_probes("moved", Probes) is None
    stored.write_text(stored.read_text().replace(f'"format":{FORMAT}', '"format":99', 1))
    assert cache.load_probes(probes.key, Probes) is None


def keys_of(model: Path) -> Iterator[str]:
    """The keys of some settings that all measure something else."""
    recipe = recipe_of()
    prepared = open_prepared(model, recipe)
    for context in (64, CONTEXT):
        for timed in (False, True):
            yield probes_key(prepared.trials(), context, timed=timed)
    further = recipe.validation.model_copy(update={"recall_distance": 24})
    for update in ({"validation": further}, {"weights": recipe_of(weights="int8").weights}):
        prepared.recipe = recipe.model_copy(update=update)
        yield probes_key(prepared.trials(), CONTEXT, timed=False)


def test_key_differs_when_anything_that_is_measured_does(tiny_llama: Path) -> None:
    keys = list(keys_of(tiny_llama))
    assert len(set(keys)) == len(keys) == 6
    assert keys == list(keys_of(tiny_llama))


def test_probes_and_recordings_need_no_torch() -> None:
    modules = "kvslim.planning.probes, kvslim.planning.planner, kvslim.calibrate.cache, kvslim.calibrate.recording"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
