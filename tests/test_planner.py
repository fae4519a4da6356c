"""Budgets: the plan keeps every limit, holds the bytes it tells, and is never worse than all layers alike."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from support.models import CALIBRATION, open_prepared, recipe_of
from support.models import VALIDATION as SMALL
from support.planning import planner_of
from support.tiny_artifact import SPEC
from threadpoolctl import threadpool_info, threadpool_limits

from kvslim import pipeline
from kvslim.calibrate.statistics import CalibrationStatistics
from kvslim.checks import check_plan, check_task
from kvslim.cli import app
from kvslim.cli.schemas import output_type
from kvslim.errors import GateError, UnsupportedError, UsageError
from kvslim.export.manifest import read_manifest
from kvslim.methods.kv_quant import KvQuant
from kvslim.planning.choose import Chosen, choose
from kvslim.planning.decide import planned
from kvslim.planning.planner import Planned, Planner
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.prepared.decoder_trials import DecoderTrials
from kvslim.recipe import Recipe, load_recipe, parse_recipe
from kvslim.runtime.opening import layout_of, open_session
from kvslim.settings import MARGIN, Budget
from kvslim.transform.edits import Codes
from kvslim.types import KVLayout, Plan, PlanPoint

CONTEXT = 2048


def budget_of(**limits: float | int) -> Recipe:
    recipe = Recipe(name="test", calibration=CALIBRATION, validation=SMALL)
    return recipe.model_copy(update={"budget": Budget.model_validate(limits)})


@pytest.fixture(scope="module")
def planner(prepared: PreparedDecoder, statistics: CalibrationStatistics) -> Planner:
    return planner_of(prepared, statistics)


def test_bytes_are_told_of_the_plain_graph_whatever_the_recipe_does_with_its_windows(
    tiny_model: Callable[[str], Path],
) -> None:
    recipe = recipe_of().model_copy(update={"window_cache": False})
    prepared = open_prepared(tiny_model("mistral"), recipe)
    made = planner_of(prepared, prepared.statistics)
    plain, whole = (
        KVLayout.of(prepared.spec, Plan.identity(prepared.spec, window_cache=kept)).bytes_at(made.context)
        for kept in (True, False)
    )
    assert made.plain_bytes == plain < whole


def no_drop(_: Planned) -> float:
    return 0.0


def chosen_for(planner: Planner, drop: Callable[[Planned], float] = no_drop, **limits: float | int) -> Chosen:
    return choose(planner, Budget.model_validate(limits), drop)


@pytest.mark.parametrize("ratio", [4, 6, 8, 9.5, 16])
def test_plan_holds_the_bytes_it_tells_within_its_ratio(
    prepared: PreparedDecoder, planner: Planner, ratio: float
) -> None:
    planned = chosen_for(planner, kv_ratio=ratio).planned
    check_plan(planned.plan, prepared.spec)
    size = KVLayout.of(prepared.spec, planned.plan).bytes_at(CONTEXT)
    assert size == planned.point.kv_bytes_per_token * CONTEXT
    assert size * ratio <= planner.plain_bytes
    assert planned.point.kv_ratio == pytest.approx(planner.plain_bytes / size)


def test_mib_and_ratio_choose_one_plan_when_they_mean_the_same(planner: Planner) -> None:
    mib = planner.plain_bytes / 10 / 2**20
    by_mib, by_ratio = chosen_for(planner, kv_mib=mib, context=CONTEXT), chosen_for(planner, kv_ratio=10)
    assert by_mib.planned == by_ratio.planned


@pytest.mark.parametrize("place", [0, 2, -1])
def test_plan_is_within_the_kl_and_not_larger_than_its_frontier(planner: Planner, place: int) -> None:
    frontier = planner.frontier()
    limit = 1.01 * MARGIN * frontier[place].point.kl
    planned = chosen_for(planner, max_kl=limit).planned
    assert planned.point.kl * MARGIN <= limit
    assert planned.point.kv_ratio >= frontier[place].point.kv_ratio


def test_recall_drop_decides_when_it_is_the_only_limit(planner: Planner) -> None:
    def drop(planned: Planned) -> float:
        return 0.5 if planned.point.kv_ratio > 9 else 0.0

    planned = chosen_for(planner, drop, max_recall_drop=0.01).planned
    assert planned.point.recall_drop == 0.0
    assert 6 < planned.point.kv_ratio <= 9


@pytest.mark.parametrize(
    ("limits", "where"),
    [
        ({"kv_ratio": 1000}, "--kv-ratio, budget.kv_ratio"),
        ({"kv_mib": 0.001, "context": CONTEXT}, "--kv-mib-at, budget.kv_mib"),
        ({"max_kl": 1e-12}, "--max-kl, budget.max_kl"),
        ({"kv_ratio": 16, "max_kl": 1e-12}, "--max-kl, budget.max_kl"),
        ({"max_recall_drop": 0.1}, "--max-recall-drop, budget.max_recall_drop"),
        ({"kv_ratio": 8, "max_recall_drop": 0.1}, "--max-recall-drop, budget.max_recall_drop"),
    ],
)
def test_budget_is_refused_when_no_plan_keeps_it(planner: Planner, limits: dict[str, float], where: str) -> None:
    with pytest.raises(GateError) as caught:
        chosen_for(planner, lambda _: 0.9, **limits)
    assert caught.value.where == where
    assert caught.value.fix


@pytest.mark.parametrize("limits", [{"kv_ratio": 1000}, {"kv_mib": 1e-4, "context": CONTEXT}])
def test_size_that_is_told_to_be_enough_is(planner: Planner, limits: dict[str, float]) -> None:
    with pytest.raises(GateError) as caught:
        chosen_for(planner, **limits)
    ratio, mib = re.fullmatch(r"ask for (?:a ratio of (\S+) or less|(\S+) MiB or more)", caught.value.fix).groups()
    assert (ratio is None) == ("kv_mib" in limits)
    told = {"kv_ratio": float(ratio)} if ratio else {**limits, "kv_mib": float(mib)}
    assert chosen_for(planner, **told).planned.point.kv_ratio > 1


def test_plans_that_are_measured_ahead_give_the_same_frontier(
    prepared: PreparedDecoder, statistics: CalibrationStatistics
) -> None:
    one_by_one, ahead = (planner_of(prepared, statistics) for _ in range(2))
    taken: list[int] = []

    def all_at_once(codes: Iterable[Codes]) -> Iterator[float]:
        found = list(codes)
        taken.append(len(found))
        return one_by_one.divergences(found)

    ahead.divergences = all_at_once

    def is_enough(planned: Planned) -> bool:
        return planned.point.kv_ratio > 9

    frontier = one_by_one.frontier(is_enough=is_enough)
    measured = len(one_by_one._divergences)
    assert ahead.frontier(is_enough=is_enough) == frontier
    assert taken[0] > measured >= len(frontier)  # those of smaller sizes too
    assert ahead.frontier() == one_by_one.frontier()
    assert ahead.kinds(ahead.plain_bytes / 8) == one_by_one.kinds(one_by_one.plain_bytes / 8)


def test_frontier_loses_more_as_it_gets_smaller(planner: Planner) -> None:
    points = [planned.point for planned in planner.frontier()]
    assert len(points) >= 5
    sizes = [point.kv_bytes_per_token for point in points]
    assert sizes == sorted(sizes, reverse=True)
    assert points[0].kl < points[-1].kl


@pytest.mark.parametrize("ratio", [5, 8, 16])
def test_plan_is_not_worse_than_uniform(planner: Planner, ratio: float) -> None:
    planned = chosen_for(planner, kv_ratio=ratio).planned
    budget = planned.point.kv_bytes_per_token * CONTEXT
    alike = [
        planner._planned([layer[place].layer for layer in planner.whole[4]])
        for place in range(len(planner.whole[4][0]))
        if sum(layer[place].size for layer in planner.whole[4]) <= budget
    ]
    assert alike
    assert planned.point.kl <= alike[-1].point.kl


def test_same_inputs_give_the_same_plan(prepared: PreparedDecoder, statistics: CalibrationStatistics) -> None:
    first, second = (chosen_for(planner_of(prepared, statistics), kv_ratio=8) for _ in range(2))
    assert first == second


def test_int4_plan_of_a_sliding_window_model_runs(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """In a window the kernel takes int4 in heads of 32 and more alone."""
    model = str(tiny_model("mistral"))
    summary = pipeline.plan(model, budget_of(kv_ratio=7))
    assert {layer.cache.dtype for layer in summary.plan.layers} == {"int4"}
    manifest = pipeline.compress(model, budget_of(kv_ratio=7), tmp_path / "out", plan=summary.plan)
    assert manifest.report is not None
    assert manifest.report.artifact.kv_bytes_per_token == summary.kv_bytes_per_token
    assert summary.kv_bytes_per_token * 7 <= summary.plain_kv_bytes_per_token


def test_plan_tells_kl_and_frontier_as_json(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["calibration.samples=4", "calibration.length=48"]
    options = [part for setting in settings for part in ("--set", setting)]
    out = tmp_path / "plan.json"
    command = ["plan", str(tiny_llama), "-r", "lossless", "--kv-ratio", "8", "-o", str(out), "--json", *options]
    assert app.run(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert output_type("plan").model_validate(told)
    assert told["kl"] > 0
    assert told["kv_bytes_per_token"] * 8 <= told["plain_kv_bytes_per_token"]
    assert told["smaller_than"]["fp16"] == told["smaller_than"]["fp32"] / 2 >= 4
    assert set(told["frontier"][0]) == {"cache", "kv_bytes_per_token", "kv_ratio", "time_ratio", "kl", "recall_drop"}
    assert all(layer["cache"]["rotation"] == 0 for layer in told["plan"]["layers"])
    assert Plan.model_validate_json(out.read_text()) == Plan.model_validate(told["plan"])
    assert "expected to fail" not in capsys.readouterr().out
    limits = ["--set", "gates.max_kl=1e-9"]
    assert app.run(["plan", str(tiny_llama), "--kv-mib-at", "1k=0.0625", *options, *limits]) == 0
    table = capsys.readouterr().out
    assert re.search(r"expected to fail: max_kl \S+ against 1e-09\n", table)
    assert "KL to plain" in table
    assert "x smaller than fp32, " in table
    assert "genai int8" in table
    assert "int4" in table


@pytest.mark.parametrize("limit", [("--kv-ratio", "1000"), ("--kv-mib-at", "2k=0.001"), ("--max-kl", "1e-12")])
@pytest.mark.parametrize("verb", ["plan", "compress"])
def test_impossible_budget_exits_3_and_writes_nothing(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, limit: tuple[str, str]
) -> None:
    command = [verb, str(tiny_llama), "-o", str(tmp_path / "out"), *limit]
    settings = ["--set", "calibration.samples=4", "--set", "calibration.length=48"]
    assert app.run([*command, *settings]) == GateError.exit_code
    assert "  fix: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_budget_replaces_methods_and_sets_the_gates() -> None:
    lossless = load_recipe("lossless")
    recipe = lossless.within(Budget(kv_ratio=10, max_kl=0.05))
    assert lossless.methods
    assert recipe.methods == ()
    assert recipe.budget == Budget(kv_ratio=10, max_kl=0.05)
    assert (recipe.gates.max_kv_ratio, recipe.gates.max_kl, recipe.gates.max_recall_drop) == (0.1, 0.05, 0.01)
    limits = "a cache 10 times smaller than plain fp32, a mean KL of at most 0.05"
    assert recipe.description == f"Chosen by the planner: {limits}."


@pytest.mark.parametrize(
    ("budget", "limits"),
    [
        ({"kv_ratio": 200}, {"max_kl": 0.1, "max_recall_drop": 0.05, "max_kv_ratio": 0.005}),
        ({"kv_mib": 64, "context": 2048}, {"max_kl": 0.1, "max_recall_drop": 0.05, "max_kv_mib": 64}),
        ({"time_ratio": 0.7}, {"max_kl": 0.1, "max_recall_drop": 0.05, "max_kv_ratio": 0.125, "max_time_ratio": 0.7}),
        ({"max_kl": 0.02}, {"max_kl": 0.02, "max_recall_drop": 0.05, "max_kv_ratio": 0.125}),
        ({"max_recall_drop": 0.2}, {"max_kl": 0.1, "max_recall_drop": 0.2, "max_kv_ratio": 0.125}),
    ],
)
def test_every_limit_of_a_budget_is_a_gate_and_the_gates_of_quality_stay(
    budget: dict[str, float], limits: dict[str, float]
) -> None:
    recipe = load_recipe("small").within(Budget.model_validate(budget))
    assert recipe.gates.model_dump(exclude_none=True) == limits
    assert recipe.calibration.context == budget.get("context")


def test_bytes_of_a_budget_count_at_the_target_context_alone() -> None:
    recipe = load_recipe("small", ["calibration.context=4096"])
    assert recipe.within(Budget(kv_mib=4, context=4096)).gates.max_kv_mib == 4
    with pytest.raises(UsageError, match="bytes at 8,192 tokens, and the target context is 4,096"):
        recipe.within(Budget(kv_mib=4, context=8192))


def test_recall_is_measured_at_larger_sizes_up_to_one_that_keeps_the_gate(planner: Planner) -> None:
    def drop(planned: Planned) -> float:
        return 0.5 if planned.point.kv_ratio > 6 else 0.01

    chosen, frontier = choose(planner, Budget(kv_ratio=16), drop, recall_gate=0.05)
    known = {point.kv_ratio: point.recall_drop for point in frontier if point.recall_drop is not None}
    assert chosen.point in frontier
    assert chosen.point.recall_drop == 0.5
    assert min(known) <= 6 < sorted(known)[1]
    assert all(point.recall_drop is None for point in frontier if point.kv_ratio < min(known))
    sought, _ = choose(planner, Budget(max_kl=1e3), drop, recall_gate=0.05)
    assert sought.point.recall_drop == 0.01


def test_budget_is_refused_when_the_model_has_no_cache() -> None:
    encoder = SPEC.model_copy(update={"task": "fill-mask", "model_type": "bert"})
    with pytest.raises(UnsupportedError, match="asks for a budget"):
        check_task(Recipe(name="test", budget=Budget(kv_ratio=8)), encoder)


def test_compress_within_a_budget_is_its_recipe_with_the_planner(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    validation = {"samples": 2, "length": 48, "recall_items": 2, "recall_distance": 16, "repeats": 3}
    settings = {f"validation.{key}": value for key, value in validation.items()}
    settings |= {"validation.prompts": [16], "validation.contexts": [32]}
    settings |= {"calibration.samples": 4, "calibration.length": 48}
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    out = tmp_path / "out"
    command = ["compress", str(tiny_llama), "-o", str(out), "-r", "lossless", "--kv-ratio", "8", "--max-kl", "5"]
    assert app.run([*command, "--json", *options]) == 0
    told = json.loads(capsys.readouterr().out)
    manifest = read_manifest(out)
    recipe = parse_recipe(manifest.recipe, "test")
    assert (recipe.name, recipe.methods, recipe.budget) == ("lossless", (), Budget(kv_ratio=8, max_kl=5))
    assert {gate["name"]: gate["limit"] for gate in told["gates"]} == {
        "max_kl": 5,
        "max_recall_drop": 0.01,
        "max_kv_ratio": 0.125,
    }
    assert told["ratio"]["kv_bytes_per_token"] <= 1 / 8
    assert layout_of(open_session(out)) == KVLayout.of(manifest.spec, manifest.plan)


def _found(ratio: float, kl: float, time_ratio: float) -> Planned:
    point = PlanPoint(cache="int4", kv_bytes_per_token=1024 / ratio, kv_ratio=ratio, time_ratio=time_ratio, kl=kl)
    return Planned(Plan(layers=()), point)


def test_int8_is_taken_where_what_loses_least_is_slower_than_plain() -> None:
    planner = object.__new__(Planner)
    planner.context = 8
    int8 = _found(4, 0.0005, 0.7)
    planner._by_bits = lambda size: [int8] if size >= 2048 else []
    assert planner.smallest(0.01, [_found(4, 0.0004, 1.5), _found(5, 0.001, 1.2), _found(8, 0.01, 0.9)]) is int8


def test_fastest_plan_within_a_divergence_is_taken_where_all_are_slower_than_plain() -> None:
    planner = object.__new__(Planner)
    planner.context = 8
    planner._by_bits = lambda _: []
    frontier = [_found(4, 0.0004, 1.2), _found(5, 0.001, 1.5), _found(8, 0.01, 1.1)]
    assert planner.smallest(0.01, frontier) is frontier[0]


def test_smallest_plan_within_a_divergence_is_no_slower_than_plain() -> None:
    planner = object.__new__(Planner)
    planner.context = 8
    slower = _found(4.5, 0.001, 1.2)
    planner._by_bits = lambda _: [slower]
    frontier = [_found(4, 0.0005, 0.8), _found(5, 0.005, 1.1), _found(8, 0.05, 0.9)]
    assert planner.smallest(0.01, frontier) is frontier[0]
    assert planner.smallest(0.13, frontier) is frontier[2]
    planner._by_bits = lambda _: [_found(4.5, 0.001, 1.0), _found(4.5, 0.0005, 1.2)]
    assert planner.smallest(0.01, frontier).point.kv_ratio == 4.5
    with pytest.raises(GateError, match="no plan is sure") as refused:
        planner.smallest(0.0001, frontier)
    assert refused.value.fix == "allow 0.0013 or more"
    frontier[0] = _found(4, 0.00049, 0.8)
    with pytest.raises(GateError) as refused:
        planner.smallest(0.0001, frontier)
    least = float(refused.value.fix.split()[1])
    assert planner.smallest(least, frontier).point.kl <= least / MARGIN


def test_limits_that_no_size_keeps_are_refused(planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "frontier", lambda *_: [])
    with pytest.raises(GateError, match="no plan keeps the limit of time at 2,048 tokens"):
        choose(planner, Budget(max_kl=0.1), lambda _: 0.0)


def test_numpy_plans_with_one_thread(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of numpy's BLAS wait for each other where other processes have the cores."""
    seen: list[int] = []
    measured = DecoderTrials.loss

    def heard(trials: DecoderTrials, codes: Codes) -> float:
        seen.extend(each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas")
        return measured(trials, codes)

    monkeypatch.setattr(DecoderTrials, "loss", heard)
    with threadpool_limits(2, user_api="blas"):
        planned(open_prepared(tiny_llama, recipe_of([KvQuant()])))
    assert set(seen) == {1}
