"""Devices as a few numbers, each with its source, from a YAML file or from the profiles that come with KVSlim."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from kvslim.contract import Frozen
from kvslim.errors import NotFoundError, UsageError, fault_of, suggestion
from kvslim.yaml_file import read_yaml

SUFFIXES = (".yaml", ".yml")


class Quantity(Frozen):
    """A number and its source."""

    value: float = Field(ge=1e-6, le=1e12)  # what is computed from them stays finite
    source: str = Field(min_length=1)


class Share(Quantity):
    """A share, at most 1."""

    value: float = Field(gt=0, le=1)


class Device(Frozen):
    """What a machine offers to a model on its CPU."""

    name: str = Field(min_length=1)
    ram_gib: Quantity = Field(description="memory, GiB")
    usable_share: Share = Field(description="share of the memory that the system and other programs leave free")
    bandwidth_gb_s: Quantity = Field(
        description="bandwidth of reading memory, all cores together, 1e9 bytes per second"
    )
    gflops: Quantity = Field(description="float32 multiplications and additions, all cores together, 1e9 per second")
    kernels: dict[str, Quantity] = Field(
        {}, description="kernels that decode a token, where they were timed: numbers that each takes, 1e9 per second"
    )

    @property
    def usable_bytes(self) -> int:
        """Memory that a model can use."""
        return int(self.ram_gib.value * self.usable_share.value * 2**30)


def shipped_devices() -> dict[str, Path]:
    """The profiles that come with KVSlim, by name."""
    folder = Path(str(resources.files("kvslim.devices")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def device_memory() -> tuple[tuple[str, float], ...]:
    """The shipped devices with the GiB that a model can use on each."""
    devices = (load_device(name) for name in shipped_devices())
    return tuple((device.name, device.usable_bytes / 2**30) for device in devices)


def load_device(name: str) -> Device:
    """A shipped profile by name, or your own profile by path.

    Raises:
        UsageError: No profile has that name, or the file is not a profile; the error names every wrong key.
        NotFoundError: There is no such file.
    """
    shipped = shipped_devices()
    path = shipped.get(name, Path(name))
    if name not in shipped and path.suffix not in SUFFIXES:
        raise UsageError(
            f"no device {name!r}", where="--device", fix=f"{suggestion(name, shipped)} (or give a .yaml file)"
        )
    if not path.is_file():
        own = f"write --device {path.stem}" if path.stem in shipped else None
        fix = own or "write one with `kvslim doctor --measure FILE.yaml`"
        raise NotFoundError("no such device file", where=f"--device {name}", fix=fix)
    return _parse(read_yaml(path), path)


def device_text(device: Device) -> str:
    """A profile as the YAML file that `load_device` reads."""
    return yaml.safe_dump(device.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _parse(data: Any, path: Path) -> Device:
    try:
        return Device.model_validate(data)
    except ValidationError as error:
        faults = "; ".join(fault_of(fault, "profile") for fault in error.errors())
        fix = "see docs/devices.md, or write one with `kvslim doctor --measure FILE.yaml`"
        raise UsageError(faults, where=str(path), fix=fix) from error
