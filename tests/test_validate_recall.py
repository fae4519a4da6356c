from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.tiny_graph import write_tiny

from kvslim.errors import UsageError
from kvslim.runtime.session import DecodeSession
from kvslim.validation.recall import (
    CUE,
    LEAST_ITEMS,
    SPAN,
    RecallItem,
    both_hits,
    capacity_for,
    compare_recall,
    confidence_factor,
    measure_recall,
    repeated_spans,
)

TEXT = np.random.default_rng(0).integers(1, 200, size=(6, 64))
SMALL = np.random.default_rng(1).integers(24, size=(4, 64))  # of the tiny graph's vocabulary


@pytest.fixture
def session(tmp_path: Path) -> DecodeSession:
    return DecodeSession(write_tiny(tmp_path / "model.onnx"), capacity=64)


def test_recall_counts_argmax_hits_when_answers_are_teacher_forced(session: DecodeSession) -> None:
    prompt, answer = tuple(range(20)), (4, 9, 2, 7)
    best = session.step([*prompt, *answer])[19:-1].argmax(axis=-1)
    # Only the last token is changed to a hit, since an earlier one would change what follows it.
    hit = (*answer[:-1], int(best[-1]))
    expected = sum(int(guess) == token for guess, token in zip(best, hit, strict=True)) / 4
    assert measure_recall(session, [RecallItem(prompt, hit)]) == expected >= 0.25


def test_recall_is_a_share_of_tokens_when_answers_differ_in_length(session: DecodeSession) -> None:
    best = int(session.step([1, 2, 3])[-1].argmax())
    miss = (best + 1) % 24
    session.reset()
    after = int(session.step([1, 2, 3, miss])[-1].argmax())
    items = [RecallItem((1, 2, 3), (best,)), RecallItem((1, 2, 3), (miss, (after + 1) % 24))]
    assert measure_recall(session, items) == pytest.approx(1 / 3)


@pytest.mark.parametrize("items", [[], [RecallItem((), (1,))], [RecallItem((1,), ())]])
def test_recall_raises_usage_error_when_an_item_is_empty(session: DecodeSession, items: list[RecallItem]) -> None:
    with pytest.raises(UsageError, match="recall needs"):
        measure_recall(session, items)


def _distance(item: RecallItem) -> int:
    """Tokens between the two copies of an item's span."""
    text, span = item.prompt[:-CUE], (*item.prompt[-CUE:], *item.answer)
    (start,) = (start for start in range(len(text)) if text[start : start + SPAN] == span)
    return len(text) - start - SPAN


@pytest.mark.parametrize("spread", [0.5, 0.75])
def test_repeated_spans_repeat_at_distances_from_all_to_the_rest_of_the_spread(spread: float) -> None:
    items = repeated_spans(TEXT, count=12, distance=400, spread=spread)
    distances = [_distance(item) for item in items]
    assert (distances[0], distances[-1]) == (400, 400 - 400 * spread)
    assert distances == sorted(distances, reverse=True)
    assert all(len(set(item.answer)) == SPAN - CUE for item in items)


@pytest.mark.parametrize(("distance", "spans"), [(16, 1), (32, 2), (100, 4), (512, 12)])
def test_repeated_spans_share_a_text_when_it_has_room(distance: int, spans: int) -> None:
    items = repeated_spans(TEXT, count=2 * spans, distance=distance)
    assert {len(item.prompt) for item in items} == {SPAN + distance + CUE}
    texts = [item.prompt[:-CUE] for item in items]
    assert len(set(texts)) == 2
    assert texts[0] == texts[spans - 1]


def test_repeated_spans_take_filler_from_text_when_made() -> None:
    flat = TEXT.reshape(-1)
    runs = {tuple(flat[start : start + 28]) for start in range(flat.size - 28)}
    fillers = [item.prompt[SPAN : SPAN + 28] for item in repeated_spans(TEXT, count=5, distance=28, seed=2)]
    assert sum(filler in runs for filler in fillers) >= 4
    assert len(set(fillers)) == 5


def _tokens_run(session: DecodeSession, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes the tokens of every step of a session."""
    counts: list[int] = []
    step = session.step
    monkeypatch.setattr(
        session, "step", lambda tokens, *more, **named: counts.append(len(tokens)) or step(tokens, *more, **named)
    )
    return counts


def test_recall_reads_a_text_once_when_its_questions_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = repeated_spans(SMALL, count=8, distance=100)
    session = DecodeSession(write_tiny(tmp_path / "model.onnx"), capacity=capacity_for(items))
    counts = _tokens_run(session, monkeypatch)
    assert 0 < measure_recall(session, items) < 1
    assert sum(counts) == 2 * (SPAN + 100 + 4 * SPAN - 1)  # two texts of four questions
    assert capacity_for(items) == SPAN + 100 + 4 * SPAN


def test_questions_of_a_text_follow_each_other(tmp_path: Path) -> None:
    """Each is answered as if the text and the questions before it were its prompt."""
    items = repeated_spans(SMALL, count=4, distance=100)
    session = DecodeSession(write_tiny(tmp_path / "model.onnx"), capacity=capacity_for(items))
    prompt, chained = items[0].prompt[:-CUE], []
    for item in items:
        chained.append(RecallItem((*prompt, *item.prompt[-CUE:]), item.answer))
        prompt = (*chained[-1].prompt, *item.answer)
    assert 0 < measure_recall(session, items) == np.mean([measure_recall(session, [item]) for item in chained])


def test_recall_is_told_by_distance_and_all_distances_are_asked(tmp_path: Path) -> None:
    far, near = repeated_spans(SMALL, count=60, distance=100, spans=60), repeated_spans(SMALL, count=100, distance=32)
    items = [*far, *near]
    plain, same = (DecodeSession(write_tiny(tmp_path / "model.onnx"), capacity=capacity_for(items)) for _ in range(2))
    found = compare_recall(both_hits(plain, same, items), items, 0.01)
    assert found.questions == 72  # clear after 40, but a dozen of each distance is asked
    assert found.by_reach == {100: (pytest.approx(measure_recall(plain, far)),) * 2, 32: found.by_reach[32]}
    assert found.by_reach[32][0] == pytest.approx(measure_recall(plain, near[:12]))


def _pair(tmp_path: Path, noise: float) -> list[DecodeSession]:
    return [DecodeSession(write_tiny(tmp_path / f"{level}.onnx", noise=level), capacity=80) for level in (0.0, noise)]


def test_questions_end_early_when_nothing_is_lost(tmp_path: Path) -> None:
    items = repeated_spans(SMALL, count=100, distance=32)
    plain, same = (DecodeSession(write_tiny(tmp_path / "model.onnx"), capacity=80) for _ in range(2))
    for limit in (0.01, None):
        found = compare_recall(both_hits(plain, same, items), items, limit)
        assert (found.questions, found.drop, found.drop_se) == (LEAST_ITEMS, 0, 0)


def test_questions_end_early_when_the_limit_is_far_away(tmp_path: Path) -> None:
    items = repeated_spans(SMALL, count=100, distance=32)
    assert compare_recall(both_hits(*_pair(tmp_path, 0.5), items), items, 0.9).questions == LEAST_ITEMS


def test_all_questions_are_asked_when_the_limit_is_what_is_lost(tmp_path: Path) -> None:
    items = repeated_spans(SMALL, count=100, distance=32)
    plain, slim = _pair(tmp_path, 0.5)
    drop = measure_recall(plain, items) - measure_recall(slim, items)
    found = compare_recall(both_hits(plain, slim, items), items, drop)
    assert found.questions == 100
    assert found.drop == pytest.approx(drop)


def test_standard_error_is_that_of_a_mean_when_answers_are_equally_long(tmp_path: Path) -> None:
    items = repeated_spans(SMALL, count=60, distance=32)
    plain, slim = _pair(tmp_path, 0.5)
    drops = [measure_recall(plain, [item]) - measure_recall(slim, [item]) for item in items]
    found = compare_recall(both_hits(plain, slim, items), items, float(np.mean(drops)))
    assert 0 < found.drop_se == pytest.approx(np.std(drops, ddof=1) / np.sqrt(60))


def test_confidence_sequence_holds_the_mean_at_all_times_when_looked_at_often() -> None:
    draws = np.random.default_rng(0).choice([-1, 0, 1], p=[0.1, 0.8, 0.1], size=(1000, 300))
    counts = np.arange(1, 301)
    means = draws.cumsum(1) / counts
    errors = np.sqrt(np.maximum((draws**2).cumsum(1) / counts - means**2, 0) / counts)
    factors = np.array([confidence_factor(int(count)) for count in counts])
    for side in (means, -means):
        missed = (side > errors * factors)[:, LEAST_ITEMS - 1 :].any(1)
        assert missed.mean() <= 0.05
        fixed = (side > errors * 1.64)[:, LEAST_ITEMS - 1 :].any(1)
        assert fixed.mean() > 0.1


def test_repeated_spans_start_with_bos_when_every_window_does() -> None:
    windows = np.concatenate([np.zeros((6, 1), np.int64), TEXT], axis=1)
    for item in repeated_spans(windows, count=5, distance=40):
        assert item.prompt[0] == 0
        assert 0 not in (*item.prompt[1:], *item.answer)


def test_repeated_spans_of_one_window_start_with_bos_when_it_is_known() -> None:
    window = np.concatenate([np.zeros((1, 1), np.int64), TEXT.reshape(1, -1)], axis=1)
    items = repeated_spans(window, count=5, distance=40, starts=(7, 0))
    assert all(item.prompt[0] == 0 and 0 not in (*item.prompt[1:], *item.answer) for item in items)
    assert any(item.prompt[0] != 0 for item in repeated_spans(window, count=5, distance=40, starts=(7,)))


def test_repeated_spans_are_the_same_when_the_seed_is() -> None:
    first, same, other = (repeated_spans(TEXT, count=3, distance=8, seed=seed) for seed in (1, 1, 2))
    assert first == same != other


def test_repeated_spans_wrap_around_when_text_is_shorter_than_the_distance() -> None:
    (item,) = repeated_spans(TEXT[:1, :10], count=1, distance=50)
    assert len(item.prompt) == SPAN + 50 + CUE


def test_repeated_spans_raise_usage_error_when_there_is_no_text() -> None:
    with pytest.raises(UsageError, match="text"):
        repeated_spans(np.zeros((0, 4), np.int64), count=1, distance=4)
