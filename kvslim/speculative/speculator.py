"""How many tokens to propose, and from where: as many as bring most tokens per second on this machine.

Du et al., "GLIDE with a CAPE", 2024, section 3.3: the number follows the confidence of the draft. Here the confidence
is turned into the chance that it has had so far, and what a run costs is measured as the text is written.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np

from kvslim.runtime.session import DecodeSession
from kvslim.runtime.writing import Completion
from kvslim.speculative.choice import LONG
from kvslim.speculative.estimates import MOST_PROPOSED, RUNS, HitRates, Ledger, RunCosts, Seconds, best_count
from kvslim.speculative.lookup import Lookup, match_rates
from kvslim.speculative.window import WindowDraft, confidence
from kvslim.types import Draft

LEAST_GAIN = 1.03  # what a speculation must promise over plain decoding
CONFIDENCES = 10  # classes of equal width
FIRST_PAUSE, LONGEST_PAUSE = 16, 256  # rounds after which what did not pay, or could not go back, is tried again


class Speculator:
    """Proposes tokens of one text after another, and learns from what becomes of them.

    Args:
        target: The session that verifies.
        draft: What proposes.
        clock: Tells the seconds by which runs are compared.
        costs: Of runs; None to learn them by the clock.
    """

    def __init__(
        self,
        target: DecodeSession,
        draft: Draft,
        clock: Callable[[], float] = time.perf_counter,
        costs: RunCosts | None = None,
    ) -> None:
        self.clock, self._target, self._costs = clock, target, costs or RunCosts()
        self._matches = match_rates()
        self._lookup = Lookup((), self._matches)
        self._window: WindowDraft | None = None
        if draft.kind == "window" and target.lends_rows:
            self._window = WindowDraft(target, draft.window, draft.sinks)
        self._draft_times = deque[float](maxlen=RUNS)
        self._trusted = HitRates([(place + 0.5) / CONFIDENCES for place in range(CONFIDENCES)])
        self._taken = HitRates([0.75])
        self._pause, self._next_pause, self._shut = 0, FIRST_PAUSE, 0
        self._classes: list[int] = []
        self._ledger = Ledger()
        self._drafting, self._spent = 0.0, 1.0

    def begin(self, ids: Sequence[int]) -> None:
        """Starts a text with a prompt."""
        self._lookup = Lookup(ids, self._matches)
        self._classes, self._drafting, self._spent, self._shut = [], 0.0, 1.0, 0
        if self._window is not None:
            self._window.reset()

    def proposals(self, completion: Completion, length: int) -> list[int]:
        """Tokens that may follow a text; maybe none.

        Args:
            completion: The text.
            length: Tokens in the target's cache: all but the last one.
        """
        self._classes, self._drafting = [], 0.0
        if self._shut:
            self._shut -= 1
            return []
        most = min(MOST_PROPOSED, completion.left - 1, self._target.capacity - length - 1)
        tokens, chances = self._lookup.proposals(most)
        window = self._window if self._window is not None and length >= LONG * self._window.rows else None
        single = self._costs.of_one(length) if most > 0 and (tokens or window) else None
        if single is None:
            return []
        costs = self._costs.at(length, self._ledger.stock)
        count, rate = best_count(chances, costs)
        if rate * single < LEAST_GAIN:
            count, rate = 0, 1 / single
        if window is not None and self._promises(costs, most, rate):
            return self._drafted(window, completion, costs, most)
        return tokens[: self._droppable(count)] if count else []

    def _droppable(self, count: int) -> int:
        """How many of so many tokens the cache can drop again; where none, it is not asked for some rounds."""
        while count and not self._target.takes_back(1 + count):
            count //= 2
        self._shut = 0 if count else FIRST_PAUSE
        return count

    def _promises(self, costs: Seconds, most: int, rate: float) -> bool:
        """Whether the window draft is expected to give more tokens per second than `rate`, or is to be tried again."""
        if not self._draft_times:
            return self._ledger.stock > 0
        _, expected = best_count(self._taken.shares * most, costs, median(self._draft_times))
        if expected > LEAST_GAIN * rate:
            self._next_pause = FIRST_PAUSE
            return True
        self._pause += 1
        if self._pause < self._next_pause or self._ledger.stock <= 0:
            return False
        self._pause, self._next_pause = 0, min(2 * self._next_pause, LONGEST_PAUSE)
        return True

    def _drafted(self, draft: WindowDraft, completion: Completion, costs: Seconds, most: int) -> list[int]:
        """Tokens of the window draft, as long as one more is expected to pay."""
        began = self.clock()
        draft.follow()
        tokens, chances = list[int](), list[float]()
        token = completion.tokens[-1]
        while len(tokens) < most:
            start = self.clock()
            logits = draft.step(token)
            self._draft_times.append(self.clock() - start)
            token = completion.foreseen(logits, tokens)
            self._classes.append(min(CONFIDENCES - 1, int(CONFIDENCES * confidence(logits))))
            tokens.append(token)
            chances.append(self._trusted.shares[self._classes[-1]])
            if not self._goes_on(chances, costs, most):
                break
        self._drafting = self.clock() - began
        count, _ = best_count(chances, costs)  # drafts that are made cost nothing any more
        self._classes = self._classes[:count]
        return tokens[:count]

    def _goes_on(self, chances: Sequence[float], costs: Seconds, most: int) -> bool:
        """Whether some more proposals, taken as often as in the mean, bring more tokens per second than these alone."""
        each = median(self._draft_times)
        more = [*chances, *self._taken.shares * (most - len(chances))]
        expected = 1 + np.cumsum(np.cumprod(more))
        counts = np.arange(1, most + 1)
        rates = expected / (np.array(costs[1 : most + 1]) + each * counts)
        made = len(chances)
        return bool((rates[made:] > rates[made - 1]).any())

    def ran(self, length: int, tokens: int, seconds: float) -> None:
        """Notes what a run of the target took behind a context."""
        self._costs.add(length, tokens, seconds)
        self._spent = 1.0
        if tokens > 1 or self._drafting:
            single = self._costs.of_one(length)
            assert single is not None  # else nothing is proposed
            self._spent = (seconds + self._drafting) / single

    def learn(self, drawn: Sequence[int], taken: int) -> None:
        """Notes the tokens that were drawn in a round, and how many proposals were right."""
        self._ledger.add(len(drawn), self._spent)
        for token in drawn:
            self._lookup.add(token)
        for place, kind in enumerate(self._classes[: taken + 1]):
            self._trusted.add(kind, place < taken)
            self._taken.add(0, place < taken)
