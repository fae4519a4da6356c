"""What an artifact reaches on a device, in one line."""

from __future__ import annotations

from collections.abc import Sequence

from kvslim.devices.limits import Limits
from kvslim.devices.profile import Device
from kvslim.report.limits import need


def reach_line(device: Device, limits: Sequence[Limits]) -> str:
    """Memory and speed at best at a context, next to the plain cache, and the longest context.

    Args:
        device: The device.
        limits: Those of the plain cache, and those of the artifact's, each with the decoding at one context.
    """
    plain, own = (next(stage for stage in each.stages if stage.demand.stage == "decode") for each in limits)
    return (
        f"{own.demand.context:,} tokens on {device.name} ({device.usable_bytes / 2**30:.3g} GiB): plain {need(plain)}; "
        f"this one {need(own)}; longest context {limits[1].longest_context:,} tokens ({limits[1].longest_by})"
    )
