"""Energy that the processor's packages use, if Linux reports it (RAPL, `/sys/class/powercap`)."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

POWERCAP = Path("/sys/class/powercap")


class Zone(NamedTuple):
    """A package's counter of microjoules; it wraps to 0 after `range_uj`."""

    counter: Path
    range_uj: int


@cache
def package_zones(folder: Path) -> tuple[Zone, ...]:
    """The packages whose counters can be read, which since 2020 only root may do.

    Cores and memory have counters too. They are parts of a package, so they are left out.
    """
    zones = []
    for path in sorted(folder.glob("*:*")):
        try:
            if (path / "name").read_text().startswith("package"):
                zones.append(Zone(path / "energy_uj", int((path / "max_energy_range_uj").read_text())))
                int(zones[-1].counter.read_text())
        except (OSError, ValueError):
            return ()
    return tuple(zones)


def microjoules() -> tuple[int, ...]:
    """The current counter of each package; empty if there is none."""
    return tuple(int(zone.counter.read_text()) for zone in package_zones(POWERCAP))


def joules_since(before: tuple[int, ...]) -> float:
    """Joules of all packages since `before` was read; nan if there is no counter."""
    if not before:
        return math.nan
    zones = package_zones(POWERCAP)
    spent = ((now - then) % zone.range_uj for now, then, zone in zip(microjoules(), before, zones, strict=True))
    return sum(spent) / 1e6
