"""Device limits as tables."""

from __future__ import annotations

from collections.abc import Sequence

from kvslim.devices.limits import Bound, Limits
from kvslim.report.tables import NONE, Table


def limits_table(limits: Sequence[Limits]) -> Table:
    """What each device allows: the longest context, and the most tokens per second at each context."""
    served = [bound.demand for bound in limits[0].stages if bound.demand.stage != "training"] if limits else []
    titles = (f"{demand.stage} at {demand.context:,}" for demand in served)
    rows = tuple(
        (
            entry.device,
            entry.weights,
            entry.cache,
            f"{entry.longest_context:,} ({entry.longest_by})",
            *(_rate(bound) for bound in entry.stages if bound.demand.stage != "training"),
        )
        for entry in limits
    )
    return Table(("tokens per second at most", "weights", "cache", "longest context", *titles), rows, words=True)


def stages_table(limits: Sequence[Limits]) -> Table:
    """What each stage needs at the longest context, and what limits it on each device."""
    rows = [
        _stage_row(entry, bound)
        for entry in limits
        for bound in entry.stages
        if bound.demand.context == max(other.demand.context for other in entry.stages)
    ]
    units = ("memory, MiB", "MB/token", "MFLOP/token", "FLOP/byte", "ms/token at least")
    return Table(("device", "stage", "weights", "cache", *units, "binds"), tuple(dict.fromkeys(rows)), words=True)


def _rate(bound: Bound) -> str:
    return "does not fit" if bound.binds == "memory" else f"{_figure(bound.tokens_per_second)} ({bound.binds})"


def _stage_row(entry: Limits, bound: Bound) -> tuple[str, ...]:
    """A row of the table; the one for training is the same for every cache."""
    demand = bound.demand
    stored = ("fp32", NONE) if demand.stage == "training" else (entry.weights, entry.cache)
    return (
        entry.device,
        f"{demand.stage} at {demand.context:,}",
        *stored,
        f"{demand.memory_bytes / 2**20:,.0f}",
        _figure(demand.bytes_per_token / 1e6),
        _figure(demand.flops_per_token / 1e6),
        _figure(demand.flops_per_token / demand.bytes_per_token),
        _figure(bound.seconds_per_token * 1e3),
        bound.binds,
    )


def _figure(value: float) -> str:
    """Three digits, or more if there are more before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
