"""Prints the shipped device profiles with their sources, as two markdown tables."""

from __future__ import annotations

from kvslim.devices.profile import Device, load_device, shipped_devices

FIELDS = {name: field.description for name, field in Device.model_fields.items() if name != "name"}


def main() -> None:
    """Prints the tables."""
    devices = {name: load_device(name) for name in shipped_devices()}
    print("| `--device` | RAM, GiB | usable | GB/s | GFLOP/s |\n|---|---:|---:|---:|---:|")
    for name, device in devices.items():
        numbers = (device.ram_gib, device.usable_share, device.bandwidth_gb_s, device.gflops)
        print(f"| `{name}` | {' | '.join(f'{number.value:g}' for number in numbers)} |")
    print("\n| `--device` | number | source |\n|---|---|---|")
    for name, device in devices.items():
        for field in FIELDS:
            print(f"| `{name}` | `{field}` | {getattr(device, field).source} |")


if __name__ == "__main__":
    main()
