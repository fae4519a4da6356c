"""Windows that the planner offers: seen to lose little, kept from costing recall, and counted in bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest
from support.models import VALIDATION, open_prepared, recipe_of
from support.planning import alike, much, nothing, planner_of

from kvslim.caches import WindowCache
from kvslim.calibrate.statistics import CalibrationStatistics
from kvslim.errors import GateError
from kvslim.planning.budget import planner_of as planner_of_model
from kvslim.planning.candidates import SINKS, Candidate
from kvslim.planning.choose import choose
from kvslim.planning.planner import Planned, Planner
from kvslim.planning.windows import Forgetting, WindowTrials, windows_by_recall
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.progress import Silent
from kvslim.settings import Budget
from kvslim.stages import PARTS, PLAN
from kvslim.transform.edits import Codes, LayerEdit
from kvslim.transform.recall_trials import AnswerTrials
from kvslim.types import KVLayout

T = TypeVar("T")
CONTEXT = 128
STEP = "shares of windows tried"


def windows_in(codes: Codes) -> dict[int, int]:
    return {layer: code.cache.window for layer, code in enumerate(codes) if isinstance(code.cache, WindowCache)}


def windows_among(candidates: Sequence[Candidate]) -> set[int | None]:
    caches = (each.layer.cache for each in candidates)
    return {cache.window if isinstance(cache, WindowCache) else None for cache in caches}


@pytest.mark.parametrize(
    ("seen", "context", "lengths"),
    [
        (512, 512, [128, 64, 32]),
        (512, 2048, [256, 128]),
        (512, 2049, []),
        (100, 128, [32, 16]),
        (32, 64, [16]),
        (16, 64, []),
    ],
)
def test_windows_are_tried_on_text_twice_as_long_and_a_quarter_of_the_context(
    seen: int, context: int, lengths: list[int]
) -> None:
    assert WindowTrials(seen, nothing, alike, nothing).lengths(context) == lengths


def test_loss_grows_with_the_share_of_tokens_beyond_the_window() -> None:
    asked: list[dict[int, int]] = []

    def divergence(codes: Codes) -> float:
        asked.append(windows_in(codes))
        return 0.75

    trials = WindowTrials(512, divergence, alike, nothing)
    assert trials.loss(1, 128, 4, context=512) == pytest.approx(0.75)
    # Three quarters of the text lie beyond 128 tokens, 15 of 16 parts of a context of 2,048.
    assert trials.loss(1, 128, 4, context=2048) == pytest.approx(15 / 16)
    assert asked == [{1: 128}] * 2


def test_of_a_large_model_the_longest_window_alone_is_tried() -> None:
    trials = WindowTrials(1024, nothing, alike, nothing)
    assert trials.lengths(4096) == [512, 256]
    assert trials._replace(most=1).lengths(4096) == [512]


def test_layers_that_move_answers_least_get_windows_as_many_as_keep_recall() -> None:
    asked: list[dict[int, int]] = []

    def drop(codes: Codes) -> float:
        asked.append(windows_in(codes))
        return 0.5 * (len(asked[-1]) > 3)

    def shifts(edit: LayerEdit, layers: Sequence[int]) -> dict[int, float]:
        assert isinstance(edit.cache, WindowCache)
        return {layer: abs(layer - 2.4) for layer in layers}

    trials = WindowTrials(512, nothing, shifts, drop)
    losses = dict.fromkeys((0, 1, 2, 3, 4, 5, 7), 0.1)
    found = windows_by_recall({64: losses, 128: losses}, 8, trials)
    # What 128 tokens take recall from is not tried with 64.
    assert found == dict.fromkeys((128, 64), Forgetting(layers=(2, 3, 1, 4, 0, 5, 7), kept=3))
    assert [len(each) for each in asked] == [4, 2, 3, 2, 3]


def test_no_layer_gets_a_window_where_each_costs_recall() -> None:
    found = windows_by_recall({64: {0: 0.1, 1: 0.2}}, 2, WindowTrials(512, nothing, alike, much))
    assert found == {64: Forgetting(layers=(0, 1), kept=0)}


def test_layers_that_move_answers_most_keep_their_cache_longest(planner_with: Callable[..., Planner]) -> None:
    planner = planner_with(drop=lambda _: 0.5)
    known = planner._probes.recall.windows
    assert known is not None
    layers = known[32].layers
    for share, count in ((0.5, len(layers) // 2), (1, len(layers))):
        offered = planner._probes.forgetting(share).windowed
        assert [set(each) for each in offered] == [set(known[length].layers[:count]) for length in known]
    assert planner._probes.windowed == []


@pytest.fixture(scope="module")
def planner_with(prepared: PreparedDecoder, statistics: CalibrationStatistics) -> Callable[..., Planner]:
    def made(divergence: Callable[[Codes], float] = nothing, drop: Callable[[Codes], float] = nothing) -> Planner:
        return planner_of(prepared, statistics, context=CONTEXT, windows=(divergence, drop))

    return made


def test_window_that_loses_nothing_is_offered_in_every_layer(
    prepared: PreparedDecoder, planner_with: Callable[..., Planner]
) -> None:
    planner = planner_with()
    for kinds in planner.offered.values():
        offered = [windows_among(layer) for layers in kinds for layer in layers]
        assert offered == [{None}] * 2 + [{None, 32}] * 2 + [{None, 16}] * 2
    planned = planner._planned(planner._filled(planner.plain_bytes / 20, planner.offered[4][1]) or ())
    windowed = [layer for layer in planned.plan.layers if isinstance(layer.cache, WindowCache)]
    assert windowed
    assert {layer.cache.sinks for layer in windowed if isinstance(layer.cache, WindowCache)} == {SINKS}
    assert all("recent tokens" in layer.reason for layer in windowed)
    assert planned.point.kv_bytes_per_token * CONTEXT == KVLayout.of(prepared.spec, planned.plan).bytes_at(CONTEXT)
    assert planned.point.kv_ratio >= 20


def test_plan_is_no_worse_than_one_without_windows(planner_with: Callable[..., Planner]) -> None:
    """Windows that seemed to lose nothing lose much in the text of the evaluator."""
    misled, whole = planner_with(), planner_with(much)
    for ratio in (8, 16):
        plans = [planner.allocated(planner.plain_bytes / ratio) for planner in (misled, whole)]
        assert plans[0] is not None
        assert plans[1] is not None
        assert plans[0].point.kl <= plans[1].point.kl


@pytest.mark.parametrize(
    "refusal", [{"divergence": lambda _: 1e9}, {"drop": lambda _: 0.5}], ids=["divergence", "recall"]
)
def test_no_window_is_offered_when_it_costs_too_much(
    planner_with: Callable[..., Planner], refusal: dict[str, Callable[[Codes], float]]
) -> None:
    planner = planner_with(**refusal)
    whole = {bits: [[list(layer) for layer in layers]] for bits, layers in planner.whole.items()}
    assert planner.offered == whole


@pytest.mark.parametrize(
    ("without", "with_windows", "kl", "is_windowed"),
    [(0.5, 0.2, 0.1, True), (0.5, 0.6, 0.1, False), (0.01, 0.0, 0.1, False), (0.5, 0.2, 2.0, False)],
    ids=["loses less", "loses more recall", "recall is kept", "diverges more"],
)
def test_windows_may_cost_recall_where_more_is_lost_without(
    planner_with: Callable[..., Planner], without: float, with_windows: float, kl: float, *, is_windowed: bool
) -> None:
    planner = planner_with(drop=lambda _: 0.5)
    planner.divergences = lambda many: (kl if windows_in(codes) else 1.0 for codes in many)
    offered = planner.offered

    def drop(planned: Planned) -> float:
        return with_windows if windows_of(planned) else without

    chosen, frontier = choose(planner, Budget(kv_ratio=16), drop, recall_gate=0.05)
    assert bool(windows_of(chosen)) == is_windowed
    assert chosen.point.kl == (kl if is_windowed else 1.0)
    assert chosen.point.recall_drop == (with_windows if is_windowed else without)
    assert chosen.point in frontier
    assert planner.offered == offered


def test_each_share_of_windows_is_a_step_in_which_recall_is_asked(planner_with: Callable[..., Planner]) -> None:
    planner, told = planner_with(drop=lambda _: 0.5), list[str]()
    planner.divergences = lambda many: (0.1 if windows_in(codes) else 1.0 for codes in many)

    class Listening(Silent):
        def track(self, items: Iterable[T], label: str, *_: object) -> Iterator[T]:
            for item in items:
                told.append(label)
                yield item

    def drop(planned: Planned) -> float:
        told.append("recall")
        return 0.2 if windows_of(planned) else 0.5

    choose(planner, Budget(kv_ratio=16), drop, Listening(), recall_gate=0.05)
    assert told[told.index("recall") :][:5] == ["recall", STEP, "recall", STEP, STEP]
    assert STEP in PARTS[PLAN]


def test_limit_of_kl_may_be_kept_by_windows_that_cost_recall(planner_with: Callable[..., Planner]) -> None:
    planner = planner_with(drop=lambda _: 0.5)
    planner.divergences = lambda many: (0.1 if windows_in(codes) else 1.0 for codes in many)
    limits = Budget(kv_ratio=16, max_kl=0.2)
    assert windows_of(choose(planner, limits, lambda _: 0.5, recall_gate=0.05).planned)
    with pytest.raises(GateError, match="KL is about 1"):
        choose(planner, limits, nothing, recall_gate=0.05)


def windows_of(planned: Planned) -> set[int]:
    return {layer.cache.window for layer in planned.plan.layers if isinstance(layer.cache, WindowCache)}


def test_planner_offers_windows_where_the_text_allows(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text has windows of 48 tokens, and its questions reach back far enough for all of these.

    A random model recalls by chance, so here no window costs recall.
    """
    monkeypatch.setattr(AnswerTrials, "drop", lambda *_: 0.0)
    validation = VALIDATION.model_copy(update={"recall_distance": 32})
    recipe = recipe_of().model_copy(update={"validation": validation})
    planner = planner_of_model(open_prepared(tiny_llama, recipe).trials(), 80)
    assert set().union(*(windows_among(layer) for layers in planner.offered[4] for layer in layers)) == {None, 20}
