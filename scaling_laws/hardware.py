"""The table of devices, which can be extended."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from parscale.scaling_laws.data import data_rows
from parscale.scaling_laws.files import read_table


@dataclass(frozen=True)
class Hardware:
    """One device: a row of `data/hardware.csv`."""

    name: str
    """The name that `cost` takes."""
    label: str
    """The common name."""
    memory_gb: float
    """Memory in 10^9 bytes, as PyTorch reports it where the device has its own: a "80 GB" GPU offers 85."""
    bandwidth_gbs: float
    """Peak memory bandwidth in 10^9 bytes per second."""
    tflops_16bit: float
    """Peak dense arithmetic on 16-bit numbers, in 10^12 operations per second."""
    tflops_32bit: float
    """Likewise on 32-bit numbers, in 10^12 operations per second."""
    flops_efficiency: float = 0.7
    """The achievable share of the peak arithmetic."""
    bandwidth_efficiency: float = 0.9
    """The achievable share of the peak bandwidth."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[2:]:
            value, top = getattr(self, field.name), 1 if field.name.endswith("efficiency") else float("inf")
            if not (0 < value <= top and math.isfinite(value)):
                allowed = "above 0 and at most 1" if top == 1 else "above 0 and finite"
                raise ValueError(f"{field.name} of {self.name!r} is {value:g}; it must be {allowed}")

    def flops(self, bits: int) -> float:
        """The achievable arithmetic.

        Args:
            bits: of a number: 32, or at most 16.

        Returns:
            Operations per second.
        """
        return (self.tflops_32bit if bits == 32 else self.tflops_16bit) * 1e12 * self.flops_efficiency

    @property
    def bandwidth(self) -> float:
        """The achievable bandwidth, in bytes per second."""
        return self.bandwidth_gbs * 1e9 * self.bandwidth_efficiency


def read_hardware(path: str | Path) -> dict[str, Hardware]:
    """Reads a table of devices.

    Args:
        path: a CSV file with the columns of `data/hardware.csv`.

    Returns:
        The devices by name.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a column is missing, an entry is not a positive number, or a device appears twice.
    """
    needed = [field.name for field in dataclasses.fields(Hardware) if field.default is dataclasses.MISSING]
    return _devices((cells for _, cells in read_table(path, needed)), str(path))


@cache
def known_hardware() -> Mapping[str, Hardware]:
    """The devices in the package, by name."""
    return _devices(data_rows("hardware.csv"), "hardware.csv")


def find_hardware(hardware: str | Hardware) -> Hardware:
    """The given device, or the known one of this name; raises `ValueError` for an unknown name."""
    if isinstance(hardware, Hardware):
        return hardware
    if hardware not in known_hardware():
        raise ValueError(
            f"no hardware {hardware!r}; give one of {', '.join(known_hardware())}, or one of your own (Hardware, "
            "read_hardware)"
        )
    return known_hardware()[hardware]


def _devices(rows: Iterable[Mapping[str, str]], source: str) -> dict[str, Hardware]:
    devices: dict[str, Hardware] = {}
    fields = dataclasses.fields(Hardware)
    for row in rows:
        missing = [field.name for field in fields if not row.get(field.name) and field.default is dataclasses.MISSING]
        if missing:
            raise ValueError(
                f"{source}: {row.get('name') or 'a row'} has no {', '.join(missing)}; every device needs it"
            )
        try:
            numbers = {field.name: float(row[field.name]) for field in fields[2:] if row.get(field.name)}
        except ValueError as error:
            raise ValueError(f"{source}: {row['name']}: {error}; all columns but name and label are numbers") from None
        if row["name"] in devices:
            raise ValueError(f"{source}: {row['name']} appears twice; remove one of the rows")
        devices[row["name"]] = Hardware(row["name"], row["label"], **numbers)
    return devices
