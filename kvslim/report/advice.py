"""What would have passed gates that failed, from what the planner saw at other sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from kvslim.types import GateResult, Manifest, PlanPoint

Expected = Callable[[PlanPoint], float | None]

_EXPECTED: Mapping[str, Expected] = {
    "max_kl": lambda point: point.kl,
    "max_recall_drop": lambda point: point.recall_drop,
    "max_time_ratio": lambda point: point.time_ratio,
}
LIMITS = {"max_kl": "--max-kl", "max_recall_drop": "--max-recall-drop"}


def passing_budget(manifest: Manifest) -> str | None:
    """The options of `kvslim compress` for the nearest size that is expected to pass; None where none is known.

    What the planner measured on calibration text is corrected by what the artifact lost beside it on held-out text.
    Where it did not plan, or did not measure recall at a size that is good enough otherwise, it is to search.
    """
    report = manifest.report
    gates = [] if report is None else [gate for gate in report.gates if gate.value is not None]
    failed = {gate.name for gate in gates if not gate.passed}
    if report is None or not failed or not failed <= _EXPECTED.keys():
        return None
    if not manifest.frontier:
        return _search(gates) if failed <= LIMITS.keys() else None
    size = report.artifact.kv_bytes_per_token or 0.0
    own = min(manifest.frontier, key=lambda point: abs(point.kv_bytes_per_token - size))
    others = [point for point in manifest.frontier if point.kv_bytes_per_token != size]
    tests = [_test(gate, own) for gate in gates if gate.name in _EXPECTED]
    verdicts = {point.kv_ratio: [passes(point) for passes in tests] for point in others}
    passing = [ratio for ratio, found in verdicts.items() if all(found)]
    if passing:
        return f"--kv-ratio {_rounded_down(min(passing, key=lambda ratio: abs(math.log(ratio / own.kv_ratio))))}"
    unknown = any(None in found and False not in found for found in verdicts.values())
    return _search(gates) if unknown and _is_by_size(manifest) else None


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


def _is_by_size(manifest: Manifest) -> bool:
    """Whether the planner had a size to meet, rather than a quality."""
    budget = manifest.recipe.get("budget")
    return isinstance(budget, dict) and (budget.get("kv_ratio") or budget.get("kv_mib")) is not None


def _rounded_down(ratio: float) -> str:
    """A ratio that the plan of this one meets."""
    return f"{int(ratio * 100) / 100:g}"
