"""What would have passed gates that failed, from what the planner saw at other sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvslim.kv_ratios import rounded_down
from kvslim.measures import GateResult
from kvslim.recipe import load_recipe
from kvslim.settings import MARGIN, Gates
from kvslim.types import Manifest, PlanPoint

Expected = Callable[[PlanPoint], float | None]

_EXPECTED: Mapping[str, Expected] = {
    "max_kl": lambda point: point.kl,
    "max_recall_drop": lambda point: point.recall_drop,
    "max_time_ratio": lambda point: point.time_ratio,
}
LIMITS = {"max_kl": "--max-kl", "max_recall_drop": "--max-recall-drop"}
COSTS = frozenset({"max_kv_ratio", "max_kv_mib", "max_time_ratio", "max_file_mib", "max_memory_mib"})
MILDEST = "lossless"


def passing_budget(manifest: Manifest) -> str | None:
    """The options of `kvslim compress` for the nearest size that is expected to pass; None where none is known.

    Where weights and cache share a budget of memory, another size of the cache would leave the weights another.
    """
    report = manifest.report
    if report is None or any(gate.name == "max_memory_mib" for gate in report.gates):
        return None
    budget = manifest.recipe.get("budget")
    by_size = isinstance(budget, dict) and (budget.get("kv_ratio") or budget.get("kv_mib")) is not None
    size = report.artifact.kv_bytes_per_token or 0.0
    return nearest_budget(report.gates, manifest.frontier, size, by_size=by_size, alike=manifest.alike)


def likely_fix(recipe: Mapping[str, Any], gates: Sequence[GateResult]) -> str | None:
    """What is likely to pass gates that failed; None where some say that too much is lost, others that too little is.

    Args:
        recipe: As the manifest has it.
        gates: What was measured.
    """
    failed = {gate.name for gate in gates if not gate.passed}
    if failed & COSTS:
        return "use a recipe that saves more" if failed <= COSTS else None
    if recipe.get("methods") == load_recipe(MILDEST).model_dump(mode="json")["methods"]:
        return "calibrate it on text like that of the task (compress --calibration), as no recipe is milder"
    return "use a milder recipe"


def expected_gates(gates: Gates, frontier: Sequence[PlanPoint], size: float, kl: float) -> tuple[GateResult, ...]:
    """The gates of which a plan's values are expected.

    Args:
        gates: The limits.
        frontier: What the planner saw, with the plan among it.
        size: Bytes per token of the plan.
        kl: Its KL.
    """
    own = next((point for point in frontier if point.kv_bytes_per_token == size), None)
    values = {name: expected(own) if own else None for name, expected in _EXPECTED.items()} | {"max_kl": kl}
    limits = {name: getattr(gates, name) for name in values}
    return tuple(
        GateResult(name=name, value=value, limit=limits[name], passed=value <= limits[name])
        for name, value in values.items()
        if value is not None and limits[name] is not None
    )


def nearest_budget(
    gates: Sequence[GateResult],
    frontier: Sequence[PlanPoint],
    size: float,
    *,
    by_size: bool,
    alike: Sequence[PlanPoint] = (),
) -> str | None:
    """The options of `kvslim compress` for the nearest size that is expected to pass; None where none is known.

    What the planner measured on calibration text is corrected by what the artifact lost beside it on held-out text.
    Where it did not plan, or did not measure recall at a size that is good enough otherwise, it is to search.

    Args:
        gates: What was measured of an artifact, or what is expected of it.
        frontier: What the planner saw.
        size: Bytes per token of the artifact.
        by_size: Whether the planner had a size to meet, rather than a quality.
        alike: Where it did not plan, all layers alike in a few sizes; a search finds little that loses less.
    """
    gates = [gate for gate in gates if gate.value is not None]
    failed = {gate.name for gate in gates if not gate.passed}
    if not failed or not failed <= _EXPECTED.keys():
        return None
    if not frontier:
        return _search(gates) if failed <= LIMITS.keys() and _is_in_reach(gates, alike) else None
    own = min(frontier, key=lambda point: abs(point.kv_bytes_per_token - size))
    others = [point for point in frontier if point.kv_bytes_per_token != size]
    tests = [_test(gate, own) for gate in gates if gate.name in _EXPECTED]
    verdicts = {point.kv_ratio: [passes(point) for passes in tests] for point in others}
    passing = [ratio for ratio, found in verdicts.items() if all(found)]
    if passing:
        return f"--kv-ratio {rounded_down(min(passing, key=lambda ratio: abs(math.log(ratio / own.kv_ratio))))}"
    unknown = any(None in found and False not in found for found in verdicts.values())
    return _search(gates) if unknown and by_size else None


def _test(gate: GateResult, own: PlanPoint) -> Callable[[PlanPoint], bool | None]:
    """Whether a point is expected to pass a gate; None where nothing is known.

    Recall lost is corrected by a difference, because it is often 0; all else by a ratio.
    """
    expected, measured, at_own = _EXPECTED[gate.name], gate.value or 0.0, _EXPECTED[gate.name](own)

    def passes(point: PlanPoint) -> bool | None:
        value = expected(point)
        if gate.passed and point.kv_ratio <= own.kv_ratio and gate.name != "max_time_ratio":
            return True
        if value is None or at_own is None:
            return None
        if gate.name == "max_recall_drop":
            return value + max(0.0, measured - at_own) <= gate.limit
        return value * measured / max(at_own, 1e-12) <= gate.limit

    return passes


def _is_in_reach(gates: Sequence[GateResult], alike: Sequence[PlanPoint]) -> bool:
    """Whether the planner is sure to find what keeps to the limit of KL, if one of these sizes does."""
    limit = next((gate.limit for gate in gates if gate.name == "max_kl"), math.inf)
    return not alike or MARGIN * min(point.kl for point in alike) <= limit


def _search(gates: Sequence[GateResult]) -> str | None:
    """The budget of quality that has the gates as limits."""
    scales = {"max_kl": 1, "max_recall_drop": 100}
    asked = [
        f"{option} {gate.limit * scales[name]:g}"
        for name, option in LIMITS.items()
        for gate in gates
        if gate.name == name and (gate.limit > 0 or name != "max_kl")
    ]
    return " ".join(asked) or None
