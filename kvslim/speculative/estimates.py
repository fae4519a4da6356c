"""What speculation counts on: how often proposals are right, what runs cost here, and how many to make of it."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from statistics import median
from typing import Final

import numpy as np
import numpy.typing as npt

MOST_PROPOSED = 15  # with the token before them 16, up to which attention over integer caches is a step's
PRIOR_SLOPE: Final = 0.15  # share of a run of one token that each further one is taken to cost until it was tried
RUNS, FORGETTING, PRIOR_TRIALS = 9, 0.98, 4.0
Seconds = npt.NDArray[np.float64]


class HitRates:
    """Shares of proposals that were right, by class; what is long past counts less and less.

    Args:
        priors: What is taken for the share of each class before anything was seen.
    """

    def __init__(self, priors: Sequence[float]) -> None:
        self._trials = np.full(len(priors), PRIOR_TRIALS)
        self._hits = np.array(priors) * PRIOR_TRIALS

    def __getitem__(self, kind: int) -> float:
        return float(self._hits[kind] / self._trials[kind])

    def add(self, kind: int, hit: bool) -> None:
        """Counts a proposal of a class."""
        self._trials[kind] = FORGETTING * self._trials[kind] + 1
        self._hits[kind] = FORGETTING * self._hits[kind] + hit


class RunCosts:
    """Seconds that runs of 1 to 16 tokens take on this machine, learnt from the runs themselves.

    Costs are kept by powers of two of the context. A number of tokens that was not run yet costs what lies between its
    neighbours, relative to one token; beyond those that were run, a line goes on.
    """

    def __init__(self) -> None:
        self._runs: dict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=RUNS))

    def add(self, context: int, tokens: int, seconds: float) -> None:
        """Notes a run of `tokens` behind a context."""
        self._runs[context.bit_length(), tokens].append(seconds)

    def at(self, context: int) -> Seconds | None:
        """Seconds of runs of 1, 2, ... 16 tokens behind a context; None until one token was run there alone."""
        size = context.bit_length()
        if (size, 1) not in self._runs:
            return None
        single = median(self._runs[size, 1])
        ratios = {1: 1.0}
        for tokens in range(2, MOST_PROPOSED + 2):
            sizes = [other for other, count in self._runs if count == tokens and (other, 1) in self._runs]
            if sizes:
                near = min(sizes, key=lambda other: abs(other - size))
                ratios[tokens] = max(1.0, median(self._runs[near, tokens]) / median(self._runs[near, 1]))
        last = max(ratios)
        slope = (ratios[last] - 1) / (last - 1) if last > 1 else PRIOR_SLOPE
        counts = np.arange(1, MOST_PROPOSED + 2)
        known = np.interp(counts, list(ratios), list(ratios.values()))
        return single * (known + slope * np.maximum(0, counts - last))


def best_count(chances: Sequence[float], costs: Seconds, each: float = 0.0) -> tuple[int, float]:
    """How many tokens to propose so that most tokens are expected per second, and how many those are.

    Args:
        chances: Of each proposal, that it is right where those before it are.
        costs: Seconds of a run of 1, 2, ... tokens.
        each: Seconds that a proposal takes to make.
    """
    expected = 1 + np.concatenate([[0.0], np.cumsum(np.cumprod(chances))])
    rates = expected / (costs[: len(expected)] + each * np.arange(len(expected)))
    best = int(rates.argmax())
    return best, float(rates[best])
