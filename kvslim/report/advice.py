"""What would have passed a gate that failed, from what the planner saw at other sizes."""

from __future__ import annotations

from kvslim.types import Manifest, PlanPoint


def passing_budget(manifest: Manifest) -> str | None:
    """The option of `kvslim compress` that is expected to pass where mean KL was too high; None where none is known.

    What the planner measured on calibration text is scaled by what the artifact lost beside it on held-out text.
    """
    report = manifest.report
    failed = (
        next((gate for gate in report.gates if gate.name == "max_kl" and not gate.passed), None) if report else None
    )
    if report is None or failed is None or failed.value is None or failed.limit == 0:
        return None
    if not manifest.frontier:
        return f"--max-kl {failed.limit:g}"
    size = report.artifact.kv_bytes_per_token or 0.0
    nearest = min(manifest.frontier, key=lambda point: abs(point.kv_bytes_per_token - size))
    scale = failed.value / max(nearest.kl, 1e-12)
    passing = [point for point in manifest.frontier if point.kl * scale <= failed.limit]
    return f"--kv-ratio {_ratio(max(passing, key=lambda point: point.kv_ratio))}" if passing else None


def _ratio(point: PlanPoint) -> str:
    """A ratio that the point meets, rounded down."""
    return f"{int(point.kv_ratio * 100) / 100:g}"
