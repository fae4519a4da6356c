"""What speculation counts on: how often proposals are right, what runs cost here, and how many to make of it."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Final

import numpy as np
import numpy.typing as npt

MOST_PROPOSED = 15  # with the token before them 16, up to which attention over integer caches is a step's
PRIOR_SLOPE: Final = 0.15  # share of a run of one token that each further one is taken to cost until it was tried
RUNS, FORGETTING, PRIOR_TRIALS = 9, 0.98, 4.0
LEARNT: Final = 64  # runs of one token after which ratios are taken anew
GRANT, SHARE, MOST_STOCK = 2.0, 0.02, 5.0  # see `Ledger`: at first, for each token, and at most
COUNTS = np.arange(1, MOST_PROPOSED + 2)
Seconds = Sequence[float]
Relative = Sequence[tuple[float, float]]  # expected, and at worst
Costs = npt.NDArray[np.float64]


class HitRates:
    """Shares of proposals that were right, by class; what is long past counts less and less.

    Attributes:
        shares: Of each class.

    Args:
        priors: What is taken for the share of each class before anything was seen.
    """

    def __init__(self, priors: Sequence[float]) -> None:
        self.shares, self._trials = list(priors), [PRIOR_TRIALS] * len(priors)

    def add(self, kind: int, hit: bool) -> None:
        """Counts a proposal of a class."""
        kept = FORGETTING * self._trials[kind]
        self._trials[kind] = kept + 1
        self.shares[kind] = (kept * self.shares[kind] + hit) / (kept + 1)


class RunCosts:
    """Seconds that runs of 1 to 16 tokens take on this machine, learnt from the runs themselves.

    Costs are kept by powers of two of the context. A number of tokens that was not run yet costs what lies between its
    neighbours, relative to one token; beyond those that were run, the line through the last two goes on. The step from
    one token to several is no such line: several may take a slower kernel.
    """

    def __init__(self) -> None:
        self._runs: dict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=RUNS))
        self._relative, self._singles = dict[int, Relative](), 0  # runs of one since these were learnt

    def add(self, context: int, tokens: int, seconds: float) -> None:
        """Notes a run of `tokens` behind a context."""
        self._runs[context.bit_length(), tokens].append(seconds)
        self._singles += tokens == 1
        if tokens > 1 or self._singles == LEARNT:
            self._relative, self._singles = {}, 0

    def of_one(self, context: int) -> float | None:
        """Seconds of a run of one token behind a context; None where there was none yet."""
        runs = self._runs.get((context.bit_length(), 1))
        return median(runs) if runs else None

    def at(self, context: int, may_lose: float = math.inf) -> Seconds:
        """Seconds of runs of 1, 2, ... 16 tokens behind a context where one token was run already.

        Args:
            context: Tokens.
            may_lose: Runs of one token that a run of several may lose, if it keeps one token only. What could lose
                more takes forever.
        """
        size = context.bit_length()
        single = median(self._runs[size, 1])
        if size not in self._relative:
            self._relative[size] = self._learnt(size)
        worst = 1 + max(0.0, may_lose)
        return [single * cost if most <= worst else math.inf for cost, most in self._relative[size]]

    def _learnt(self, size: int) -> Relative:
        """What runs of 1, 2, ... tokens cost, in runs of one, at contexts of so many bits."""
        ratios = {1: 1.0}
        for tokens in range(2, MOST_PROPOSED + 2):
            sizes = [other for other, count in self._runs if count == tokens and (other, 1) in self._runs]
            if sizes:
                near = min(sizes, key=lambda other: abs(other - size))
                ratios[tokens] = max(1.0, median(self._runs[near, tokens]) / median(self._runs[near, 1]))
        return list(zip(_expected(ratios).tolist(), _at_most(ratios).tolist(), strict=True))


class FreeRuns(RunCosts):
    """Runs of several tokens that take as long as those of one, so that all that a draft has is proposed."""

    def of_one(self, context: int) -> float:
        """A second, which no run of a draft takes."""
        return 1.0

    def at(self, context: int, may_lose: float = math.inf) -> Seconds:
        """The same for all."""
        return [1.0] * (MOST_PROPOSED + 1)


def _expected(ratios: Mapping[int, float]) -> Costs:
    """What runs of 1, 2, ... tokens are expected to cost, from those that were tried."""
    *_, before, last = 1, *ratios
    slope = (ratios[last] - ratios[before]) / (last - before) if before > 1 else PRIOR_SLOPE
    known = np.interp(COUNTS, list(ratios), list(ratios.values()))
    return known + slope * np.maximum(0, COUNTS - last)


def _at_most(ratios: Mapping[int, float]) -> Costs:
    """What they may cost at worst: as much as the next larger one that was tried, or as many runs as further tokens."""
    last = max(ratios)
    slope = (ratios[last] - 1) / (last - 1) if last > 1 else 1.0
    tried = np.array(list(ratios))
    below = np.array(list(ratios.values()))[np.minimum(np.searchsorted(tried, COUNTS), len(tried) - 1)]
    return np.where(last < COUNTS, ratios[last] + slope * (COUNTS - last), below)


class Ledger:
    """What runs of several tokens may lose: a stock that losses take from, and that gains and time fill up again.

    It is counted in runs of one token. So a text never takes longer than it would by single tokens and the whole stock.
    """

    def __init__(self) -> None:
        self.stock = GRANT

    def add(self, tokens: int, spent: float) -> None:
        """Notes a round: its tokens, and what they took, in runs of one token."""
        self.stock = min(MOST_STOCK, self.stock + (1 + SHARE) * tokens - spent)


def best_count(chances: Sequence[float], costs: Seconds, each: float = 0.0) -> tuple[int, float]:
    """How many tokens to propose so that most tokens are expected per second, and how many those are.

    Args:
        chances: Of each proposal, that it is right where those before it are.
        costs: Seconds of a run of 1, 2, ... tokens.
        each: Seconds that a proposal takes to make.
    """
    best, rate = 0, 1 / costs[0]
    chance, expected = 1.0, 1.0
    for count, right in enumerate(chances, start=1):
        chance *= right
        expected += chance
        seconds = costs[count] + each * count
        if expected > rate * seconds:
            best, rate = count, expected / seconds
    return best, rate
