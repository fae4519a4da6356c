"""The limits of a device: the longest context, the shortest time per token, and what sets them.

A stage takes at least the time of its memory traffic at full bandwidth and at least that of its FLOPs at full rate: the
roofline of Williams et al. (2009). The larger of the two is the limit, unless the memory is too small anyway. Attention
over integers counts as the traffic and FLOPs that take as long in float32, as measured.

Where a profile has the kernels of its machine timed, decoding is what they take together, one after the other, as a
processor runs them: a forecast in place of a limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from kvslim.contract import Frozen
from kvslim.devices.demand import Cache, Demand, StoredWeights, decode, prefill
from kvslim.devices.peak import memory
from kvslim.devices.profile import Device

Resource = Literal["memory", "bandwidth", "compute"]


class Bound(Frozen):
    """How fast a device can be at a demand.

    Attributes:
        demand: What the stage needs.
        seconds_per_token: The least time it can take, or what it is expected to take.
        binds: What limits it; memory if it does not fit at all.
        is_forecast: Whether the time is that of kernels which were timed on the device.
    """

    demand: Demand
    seconds_per_token: float
    binds: Resource
    is_forecast: bool = False

    @property
    def tokens_per_second(self) -> float:
        """The most tokens per second that are possible, or those that are expected."""
        return 1 / self.seconds_per_token


class Limits(Frozen):
    """What a device allows with one type of weights and cache.

    Attributes:
        device: The device's name.
        weights, cache: The names of what is stored.
        longest_context: Tokens that fit and that the model has positions for; 0 if the weights alone do not fit.
        longest_by: What limits it.
        stages: Bounds, by stage and context.
    """

    device: str
    weights: str
    cache: str
    longest_context: int
    longest_by: Literal["memory", "positions"]
    stages: tuple[Bound, ...]


def limits(
    device: Device,
    weights: StoredWeights,
    caches: Iterable[Cache],
    positions: int,
    contexts: Sequence[int],
    others: Sequence[Demand] = (),
) -> list[Limits]:
    """The limits of a device for each cache.

    Args:
        device: The device.
        weights: The weights, which are in memory with each cache.
        caches: The caches to compare, the plain one first.
        positions: Tokens that the model has positions for.
        contexts: Lengths in tokens at which prompt and decoding are bounded.
        others: Demands that do not depend on the cache, such as training.
    """
    result = []
    plain: tuple[Bound, ...] = ()
    for cache in caches:
        longest = longest_context(device, weights, cache, positions)
        demands = [*others, *(stage(weights, cache, context) for context in contexts for stage in (prefill, decode))]
        bounds = tuple(bound(device, demand) for demand in demands)
        plain = plain or bounds
        result.append(
            Limits(
                device=device.name,
                weights=weights.name,
                cache=cache.name,
                longest_context=longest,
                longest_by="positions" if longest == positions else "memory",
                stages=tuple(map(_with_slow_prompt, bounds, plain)),
            )
        )
    return result


def _with_slow_prompt(found: Bound, plain: Bound) -> Bound:
    """A bound; of a prompt no faster than over the plain cache, since none was measured to be."""
    if found.demand.stage != "prefill":
        return found
    slower = max(found.seconds_per_token, plain.seconds_per_token)
    return found.model_copy(update={"seconds_per_token": slower})


def bound(device: Device, demand: Demand) -> Bound:
    """The roofline of one stage, with attention as slow as it was measured; or what its kernels take together."""
    moving = demand.timed_bytes_per_token / (device.bandwidth_gb_s.value * 1e9)
    computing = demand.timed_flops_per_token / (device.gflops.value * 1e9)
    slower: Resource = "bandwidth" if moving > computing else "compute"
    binds: Resource = "memory" if demand.memory_bytes > device.usable_bytes else slower
    expected = _expected(device, demand)
    seconds = max(moving, computing) if expected is None else expected
    return Bound(demand=demand, seconds_per_token=seconds, binds=binds, is_forecast=expected is not None)


def _expected(device: Device, demand: Demand) -> float | None:
    """Seconds that the kernels of a token take; None where one of them was not timed."""
    if not demand.kernels or not demand.kernels.keys() <= device.kernels.keys():
        return None
    return sum(numbers / (device.kernels[kernel].value * 1e9) for kernel, numbers in demand.kernels.items())


def longest_context(device: Device, weights: StoredWeights, cache: Cache, positions: int) -> int:
    """The most tokens, up to the model's positions, that fit into the device's memory; 0 for none."""
    fits, beyond = 0, positions + 1
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        if memory(weights, cache, middle) <= device.usable_bytes:
            fits = middle
        else:
            beyond = middle
    return fits
