from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.tiny_graph import write_tiny

from kvslim.errors import UsageError
from kvslim.runtime.session import DecodeSession
from kvslim.validation.recall import CUE, SPAN, RecallItem, measure_recall, repeated_spans

TEXT = np.random.default_rng(0).integers(1, 200, size=(6, 64))


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


def test_repeated_spans_repeat_at_the_distance_when_made() -> None:
    for item in repeated_spans(TEXT, count=5, distance=40):
        span = (*item.prompt[-CUE:], *item.answer)
        assert len(set(span)) == SPAN
        assert item.prompt[:SPAN] == span
        assert len(item.prompt) == SPAN + 40 + CUE


def test_repeated_spans_take_filler_from_text_when_made() -> None:
    flat = TEXT.reshape(-1)
    runs = {tuple(flat[start : start + 40]) for start in range(flat.size - 40)}
    fillers = [item.prompt[SPAN : SPAN + 40] for item in repeated_spans(TEXT, count=5, distance=40, seed=2)]
    assert sum(filler in runs for filler in fillers) >= 4
    assert len(set(fillers)) == 5


def test_repeated_spans_start_with_bos_when_every_window_does() -> None:
    windows = np.concatenate([np.zeros((6, 1), np.int64), TEXT], axis=1)
    for item in repeated_spans(windows, count=5, distance=40):
        assert item.prompt[0] == 0
        assert 0 not in (*item.prompt[1:], *item.answer)


def test_repeated_spans_are_the_same_when_the_seed_is() -> None:
    first, same, other = (repeated_spans(TEXT, count=3, distance=8, seed=seed) for seed in (1, 1, 2))
    assert first == same != other


def test_repeated_spans_wrap_around_when_text_is_shorter_than_the_distance() -> None:
    (item,) = repeated_spans(TEXT[:1, :10], count=1, distance=50)
    assert len(item.prompt) == SPAN + 50 + CUE


def test_repeated_spans_raise_usage_error_when_there_is_no_text() -> None:
    with pytest.raises(UsageError, match="text"):
        repeated_spans(np.zeros((0, 4), np.int64), count=1, distance=4)
