"""From a plan to edits: every method applies what the plan says of it, in order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from kvslim.contract import ModelSpec
from kvslim.methods.base import METHODS, Method
from kvslim.transform.edits import Codes, LayerEdit
from kvslim.types import Plan

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics

LAST = 1000


def fit(
    spec: ModelSpec,
    statistics: CalibrationStatistics,
    plan: Plan,
    methods: Iterable[Method] = (),
    before: int = LAST,
) -> Codes:
    """The edits that a plan asks for.

    Args:
        spec: The model's shape.
        statistics: What is known of its cache.
        plan: What happens to each layer.
        methods: Those whose options are not the defaults.
        before: Only methods of a smaller order are applied.

    Returns:
        One entry per layer.
    """
    given = {method.name: method for method in methods}
    edits = tuple(LayerEdit(cache=layer.cache) for layer in plan.layers)
    for kind in sorted(METHODS.values(), key=lambda kind: kind.order):
        if kind.order < before:
            edits = given.get(kind.name, kind()).apply(spec, statistics, plan, edits)
    return edits
