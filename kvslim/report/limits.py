"""What devices allow, as tables and in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from kvslim.devices.limits import Bound, Limits
from kvslim.digits import three_digits
from kvslim.report.memory import CacheMemory
from kvslim.report.tables import NONE, Table


def answers(memory: CacheMemory) -> Iterator[str]:
    """One line for each device and context: the memory that each cache needs, and the speed of decoding."""
    for device in dict.fromkeys(entry.device for entry in memory.devices):
        entries = [entry for entry in memory.devices if entry.device == device]
        for tokens in memory.mib:
            found = ((memory.label(entry.cache), _decode(entry, int(tokens))) for entry in entries)
            yield f"{int(tokens):,} tokens on {device}: {'; '.join(f'{name} {need(at)}' for name, at in found)}"


def limits_table(memory: CacheMemory) -> Table:
    """What each device allows: the longest context, and the most tokens per second at each context."""
    limits = memory.devices
    served = [bound.demand for bound in limits[0].stages if bound.demand.stage != "training"] if limits else []
    titles = (f"{demand.stage} at {demand.context:,}" for demand in served)
    rows = tuple(
        (
            entry.device,
            memory.label(entry.cache),
            f"{entry.longest_context:,} ({entry.longest_by})",
            *(_rate(bound) for bound in entry.stages if bound.demand.stage != "training"),
        )
        for entry in limits
    )
    return Table(("tokens per second", "cache", "longest context", *titles), rows, words=True)


def stages_table(memory: CacheMemory) -> Table:
    """What each stage needs at the longest context, and what limits it on each device."""
    rows = [
        _stage_row(memory, entry, bound)
        for entry in memory.devices
        for bound in entry.stages
        if bound.demand.context == max(other.demand.context for other in entry.stages)
    ]
    units = ("memory, MiB", "MB/token", "MFLOP/token", "FLOP/byte", "ms/token")
    return Table(("device", "stage", "weights", "cache", *units, "binds"), tuple(dict.fromkeys(rows)), words=True)


def _decode(entry: Limits, context: int) -> Bound:
    return next(bound for bound in entry.stages if (bound.demand.stage, bound.demand.context) == ("decode", context))


def need(bound: Bound) -> str:
    """The memory that a stage needs, and its speed: at best, or as timed kernels let expect."""
    mib = bound.demand.memory_bytes / 2**20
    memory = f"{mib / 2**10:.1f} GiB" if mib >= 2**10 else f"{mib:.0f} MiB"
    if bound.binds == "memory":
        return f"does not fit ({memory})"
    return f"{memory}, {_word(bound)} {three_digits(bound.tokens_per_second)} tokens/s"


def _rate(bound: Bound) -> str:
    if bound.binds == "memory":
        return "does not fit"
    return f"{_word(bound)} {three_digits(bound.tokens_per_second)} ({_reason(bound)})"


def _word(bound: Bound, limit: str = "up to") -> str:
    """How sure a number is: a limit, or what is expected."""
    return "about" if bound.is_forecast else limit


def _reason(bound: Bound) -> str:
    """What the number follows from."""
    return "timed kernels" if bound.is_forecast else bound.binds


def _stage_row(memory: CacheMemory, entry: Limits, bound: Bound) -> tuple[str, ...]:
    """A row of the table; the one for training is the same for every cache."""
    demand = bound.demand
    stored = ("fp32", NONE) if demand.stage == "training" else (entry.weights, memory.label(entry.cache))
    return (
        entry.device,
        f"{demand.stage} at {demand.context:,}",
        *stored,
        f"{demand.memory_bytes / 2**20:,.0f}",
        three_digits(demand.bytes_per_token / 1e6),
        three_digits(demand.flops_per_token / 1e6),
        three_digits(demand.flops_per_token / demand.bytes_per_token),
        f"{_word(bound, 'at least')} {three_digits(bound.seconds_per_token * 1e3)}",
        _reason(bound),
    )
