"""Temperatures, and where the board slows itself down: read at run time, found by name, never by index."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fmdeploy.jetson.reading import children, read_int, read_number, read_word

ZONES = Path("sys/class/thermal")
LOWEST_LIMIT_C = 60.0  # the firmware of some PCs names limits that a room in summer would reach
NO_SENSOR_C = -200.0  # a sensor without power reads −256 °C
LIMITING = ("passive", "hot", "critical")  # trips that slow the board or stop it; `active` ones start the fan
SLOWING = re.compile(r"cpu|gpu|soc|cv|emc|processor|devfreq|throttle", re.IGNORECASE)
HARMLESS = re.compile(r"fan|tcc|powerclamp", re.IGNORECASE)


@dataclass(frozen=True)
class Trip:
    """A temperature at which the kernel acts, and what it then does."""

    kind: str
    celsius: float


@dataclass(frozen=True)
class Zone:
    """One thermal zone.

    Attributes:
        name: Its type, such as `tj-thermal`, in lower case.
        path: Where it is in sysfs.
        trips: Trip points, in the order of the kernel.
    """

    name: str
    path: Path
    trips: tuple[Trip, ...]

    @property
    def limit_c(self) -> float | None:
        """The lowest temperature at which the board slows itself down; None where the zone has no such trip."""
        limits = (trip.celsius for trip in self.trips if trip.kind in LIMITING and trip.celsius >= LOWEST_LIMIT_C)
        return min(limits, default=None)

    def celsius(self) -> float | None:
        """Read the sensor; None where it fails or has no power."""
        milli = read_number(self.path / "temp")
        if milli is None or milli / 1000 <= NO_SENSOR_C or (milli == 0 and self.name.startswith("cv")):
            return None
        return milli / 1000


def find_zones(root: Path = Path("/")) -> list[Zone]:
    """Return all thermal zones with a name."""
    zones = []
    for path in children(root / ZONES, "thermal_zone*"):
        if name := read_word(path / "type").lower():
            zones.append(Zone(name, path, _trips(path)))
    return zones


def _trips(path: Path) -> tuple[Trip, ...]:
    trips = []
    for entry in children(path, "trip_point_*_temp"):
        milli, kind = read_number(entry), read_word(entry.with_name(entry.name[: -len("temp")] + "type"))
        if milli is not None and milli > 0 and kind:
            trips.append(Trip(kind, milli / 1000))
    return tuple(trips)


def find_slowing(root: Path = Path("/")) -> dict[str, Path]:
    """Return the cooling devices that cool by computing less: name to the file with their state, 0 when idle."""
    found = {}
    for path in children(root / ZONES, "cooling_device*"):
        name = read_word(path / "type")
        if SLOWING.search(name) and not HARMLESS.search(name):
            found[f"{name}.{path.name.removeprefix('cooling_device')}"] = path / "cur_state"
    return found


def read_slowing(devices: dict[str, Path]) -> dict[str, int]:
    """Return the state of every such device that can be read."""
    states = {name: read_int(path) for name, path in devices.items()}
    return {name: state for name, state in states.items() if state is not None and state >= 0}
