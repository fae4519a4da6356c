"""A machine where runs of several tokens cost next to nothing, so that all that a draft has is proposed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kvslim.speculative.estimates import MOST_PROPOSED

# Methods of `RunCosts`, of the class or of one instance.
CHEAP_RUNS: dict[str, Callable[..., Any]] = {
    "of_one": lambda *_: 1.0,
    "at": lambda *_: 1 + 1e-6 * np.arange(MOST_PROPOSED + 1),
}
