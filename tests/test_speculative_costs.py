"""Speculation where a run of several tokens is dear: what trials may lose, on a clock that the tests set."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest
from support.tiny_tokenizer import byte_tokenizer

from kvslim.runtime.generate import Sampling
from kvslim.runtime.session import DecodeSession
from kvslim.runtime.writing import Completion, write
from kvslim.speculative.estimates import GRANT, MOST_PROPOSED, MOST_STOCK, SHARE, Ledger
from kvslim.speculative.loop import write_speculatively
from kvslim.speculative.speculator import Speculator
from kvslim.types import Draft

STEEP = 1 + 1.1 * np.arange(MOST_PROPOSED + 1)  # as several runs of one token
STEP = np.concatenate([[1.0], 2.1 + 0.2 * np.arange(MOST_PROPOSED)])  # measured at 8,000 tokens on some processors
FLAT = 1 + 0.05 * np.arange(MOST_PROPOSED + 1)


class TimedChain:
    """A session whose logits depend on the last token alone, and whose runs take the time that a table says."""

    lends_rows = False

    def __init__(self, logits: np.ndarray, costs: np.ndarray) -> None:
        self.logits, self.costs, self.length, self.capacity, self.now = logits, costs, 1, 10_000, 0.0

    def clock(self) -> float:
        return self.now

    def step(self, tokens: Sequence[int] | Sequence[Sequence[int]]) -> np.ndarray:
        ids = np.asarray(tokens)
        self.length += ids.size
        self.now += self.costs[ids.size - 1]
        found: np.ndarray = self.logits[ids]
        return found

    def rewind(self, length: int) -> None:
        self.length = length

    def takes_back(self, _: int) -> bool:
        return True


def speed(costs: np.ndarray, sharpness: float, tokens: int, seed: int) -> float:
    """Tokens per second with a lookup over those without it, on a text of eight words."""
    logits = sharpness * np.random.default_rng(seed).standard_normal((8, 8)).astype(np.float32)
    session = TimedChain(logits, costs)
    speculator = Speculator(cast("DecodeSession", session), Draft(kind="lookup"), clock=session.clock)
    completion = Completion(byte_tokenizer(), [0], tokens, sampling=Sampling(1.0, seed=seed))
    list(write_speculatively(cast("DecodeSession", session), completion, logits[0], speculator))
    return (len(completion.tokens) - 1) / session.now


@pytest.mark.parametrize("costs", [STEEP, STEP], ids=["steep", "step"])
@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.0])
def test_trials_cost_little_where_runs_of_several_tokens_do_not_pay(costs: np.ndarray, sharpness: float) -> None:
    speeds = [speed(costs, sharpness, 256, seed) for seed in range(8)]
    assert np.median(speeds) > 0.97
    assert min(speeds) > 0.95


def test_speculation_goes_on_where_it_pays() -> None:
    assert np.median([speed(FLAT, 2.0, 256, seed) for seed in range(8)]) > 1.3
    assert np.median([speed(STEP, 6.0, 512, seed) for seed in range(8)]) > 1.1


def loop_time(drafted: bool, seed: int) -> float:
    """CPU seconds that a text of a session takes that computes nothing; no runs of several tokens pay."""
    logits = np.random.default_rng(seed).standard_normal((8, 8)).astype(np.float32)
    session = TimedChain(logits, STEEP)
    speculator = Speculator(cast("DecodeSession", session), Draft(kind="lookup"), clock=session.clock)
    completion = Completion(byte_tokenizer(), [0], 500, sampling=Sampling(1.0, seed=seed))
    start = time.process_time()
    if drafted:
        list(write_speculatively(cast("DecodeSession", session), completion, logits[0], speculator))
    else:
        list(write(cast("DecodeSession", session), [completion], logits[:1]))
    return time.process_time() - start


def test_a_draft_that_proposes_nothing_costs_little_beside_drawing_a_token() -> None:
    drafted, plain = (min(loop_time(drafted, seed) for seed in range(5)) for drafted in (True, False))
    assert drafted < 2.3 * plain


def test_losses_take_from_a_stock_that_gains_and_time_fill_up() -> None:
    ledger = Ledger()
    assert ledger.stock == GRANT
    ledger.add(1, 1 + GRANT)
    assert ledger.stock == pytest.approx(SHARE)
    ledger.add(10, 10)
    assert ledger.stock == pytest.approx(11 * SHARE)
    ledger.add(10, 1)
    assert ledger.stock == MOST_STOCK


def test_a_text_does_not_pay_for_the_last_run_of_the_one_before() -> None:
    session = TimedChain(np.zeros((8, 8), np.float32), STEEP)
    speculator = Speculator(cast("DecodeSession", session), Draft(kind="lookup"), clock=session.clock)
    speculator.ran(1, 1, 1.0)
    speculator.ran(1, 3, 3.0)
    speculator.learn([1], 0)
    left = speculator._ledger.stock
    speculator.begin([0])
    speculator.learn([1], 0)
    assert left == pytest.approx(GRANT + 1 + SHARE - 3)
    assert speculator._ledger.stock == pytest.approx(left + SHARE)
