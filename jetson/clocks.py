"""Clocks of CPU cores and GPU, their bounds, and what `jetson_clocks --show` says about them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fmdeploy.jetson.reading import children, read_number

CPUS, DEVFREQ = Path("sys/devices/system/cpu"), Path("sys/class/devfreq")
GPU = re.compile(r"gpu|ga10b|gv11b|gp10b|gm20b", re.IGNORECASE)
DIP = 0.95  # a clock below this share of the floor that was asked for was pushed down
_SHOWN = re.compile(r"^[ \t]*(\S+?):?[ \t].*?MinFreq=(\d{1,12}) MaxFreq=(\d{1,12}) CurrentFreq=(\d{1,12})",
                    re.MULTILINE)


@dataclass(frozen=True)
class Clock:
    """One clock in sysfs.

    Attributes:
        name: `cpu0` … or `gpu`.
        now: File with the present rate.
        low: File with the lowest rate that the governor may choose.
        high: File with the highest one.
        per_mhz: Units of these files in a MHz.
        load: File with the load per mille; GPU only.
    """

    name: str
    now: Path
    low: Path
    high: Path
    per_mhz: float
    load: Path | None = None

    def mhz(self) -> float | None:
        """The present rate."""
        return _scaled(self.now, self.per_mhz)

    def floor_mhz(self) -> float | None:
        """The lowest rate that the governor may choose."""
        return _scaled(self.low, self.per_mhz)

    def ceiling_mhz(self) -> float | None:
        """The highest rate that the governor may choose."""
        return _scaled(self.high, self.per_mhz)

    def load_percent(self) -> float | None:
        """Load of the GPU; None when unknown."""
        found = None if self.load is None else read_number(self.load)
        return None if found is None or not 0 <= found <= 1000 else found / 10


def _scaled(path: Path, per_mhz: float) -> float | None:
    found = read_number(path)
    return None if found is None or found < 0 else found / per_mhz


def find_clocks(root: Path = Path("/")) -> list[Clock]:
    """Return the clocks of all cores that have one, and of the GPU. Its node appears late after a start."""
    found = []
    for path in children(root / CPUS, "cpu[0-9]*/cpufreq"):
        found.append(Clock(path.parent.name, path / "scaling_cur_freq", path / "scaling_min_freq",
                           path / "scaling_max_freq", 1e3))
    for path in children(root / DEVFREQ, "*"):
        if GPU.search(path.name):
            found.append(Clock("gpu", path / "cur_freq", path / "min_freq", path / "max_freq", 1e6,
                               path / "device/load"))
    return found


@dataclass(frozen=True)
class ShownClock:
    """One line of `jetson_clocks --show`, in Hz or kHz as printed."""

    low: int
    high: int
    now: int

    @property
    def pinned(self) -> bool:
        """Whether the governor has no choice."""
        return self.low == self.high


def parse_shown(text: str) -> dict[str, ShownClock]:
    """Parse `jetson_clocks --show`: name (`cpu0`, `GPU`, `EMC`) to its clock; other lines are passed over."""
    return {found[1]: ShownClock(int(found[2]), int(found[3]), int(found[4])) for found in _SHOWN.finditer(text)}
