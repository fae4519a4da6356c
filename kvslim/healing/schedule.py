"""How long a training lasts and how large its steps are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

WARM_UP = 5  # steps in which the rate rises; a budget of time is counted in steps before it ends
LAST = 0.05  # of the rate, at the end
TIMED = 3  # steps that are timed, behind a first one that is slower
LEAST_STEPS = WARM_UP + 1
EVALUATIONS = 12  # of the held-out text, at most


def rate_of(step: int, steps: int | None) -> float:
    """The share of the learning rate at a step: a linear rise, then half a cosine down.

    Args:
        step: From 0 on.
        steps: In all; None while nobody knows, which is in the rise.
    """
    if steps is None or step < WARM_UP:
        return min(1.0, (step + 1) / WARM_UP)
    passed = (step - WARM_UP) / max(1, steps - WARM_UP)
    return LAST + (1 - LAST) * (1 + math.cos(math.pi * min(passed, 1.0))) / 2


def steps_within(seconds: float, timed: Sequence[float], evaluation: float) -> int:
    """How many steps fit into a time.

    Args:
        seconds: The budget, from the first step on; what is too little becomes the fewest steps.
        timed: Seconds of the first steps.
        evaluation: Seconds of one pass over the held-out text.
    """
    each = float(np.median(timed[1:]))
    return max(LEAST_STEPS, int((seconds - EVALUATIONS * evaluation) / each))


def is_evaluated(step: int, steps: int) -> bool:
    """Whether the held-out text is due after so many steps."""
    return step == steps or step % max(1, -(-steps // EVALUATIONS)) == 0


def batch_of(step: int, windows: int, size: int, seed: int) -> np.ndarray:
    """The windows of a step: each once in an order of chance, then all again in another.

    Args:
        step: From 0 on.
        windows: How many there are.
        size: Windows of a step.
        seed: Of the orders.
    """
    places = range(step * size, (step + 1) * size)
    orders = {
        epoch: np.random.default_rng((seed, epoch)).permutation(windows) for epoch in {p // windows for p in places}
    }
    return np.array([orders[place // windows][place % windows] for place in places])
