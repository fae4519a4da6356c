"""What an artifact reaches on a device, in one line."""

from __future__ import annotations

from collections.abc import Sequence

from kvslim.devices.limits import Bound, Limits
from kvslim.devices.profile import Device

GIB = 2**30


def reach_line(device: Device, limits: Sequence[Limits]) -> str:
    """Memory and the most tokens per second at a context, next to the plain cache, and the longest context.

    Args:
        device: The device.
        limits: Those of the plain cache, and those of the artifact's, each with the decoding at one context.
    """
    plain, own = (next(stage for stage in each.stages if stage.demand.stage == "decode") for each in limits)
    used, before = (stage.demand.memory_bytes / GIB for stage in (own, plain))
    return (
        f"{device.name}, {own.demand.context:,} tokens: {used:.2f} of {device.usable_bytes / GIB:.2f} GiB "
        f"(plain cache {before:.2f}), {_speed(own)} (plain cache {_speed(plain)}), "
        f"longest context {limits[1].longest_context:,} tokens ({limits[1].longest_by})"
    )


def _speed(stage: Bound) -> str:
    if stage.binds == "memory":
        return "does not fit"
    return f"at most {stage.tokens_per_second:.3g} tokens per second"
