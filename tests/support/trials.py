"""Trials whose losses a test makes up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from kvslim.contract import ModelSpec
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.prepared.trials import Trials
from kvslim.progress import Silent
from kvslim.transform.compensate import refitting
from kvslim.transform.edits import Codes
from kvslim.types import Plan


def refitted(prepared: PreparedDecoder, codes: Codes, windows: np.ndarray) -> Codes:
    """The codes with projections of all layers fitted to them, on some windows."""
    return [codes, *refitting(prepared.model, prepared.architecture, codes, windows, Silent())][-1]


class MadeUpTrials(Trials):
    """Trials of no model: each divergence is what a function says of the method tried."""

    loss_name = "KL"

    def __init__(self, spec: ModelSpec, divergence: Callable[[Any], float], statistics: Any = None) -> None:
        self.spec, self.statistics, self.identity = spec, statistics, Plan.identity(spec)
        self.progress, self.methods = Silent(), ()
        self.asked = divergence

    def divergence(self, change: Any) -> float:
        return self.asked(change)

    def divergences(self, changes: Iterable[Any]) -> Iterator[float]:
        return map(self.asked, changes)

    def loss(self, codes: Codes) -> float:
        raise NotImplementedError

    def refitting(self, codes: Codes) -> Iterator[Codes]:
        raise NotImplementedError
