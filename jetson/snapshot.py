"""Everything that the kernel says about the board at one moment, from files that need no rights and no tool."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fmdeploy.jetson.clocks import DIP, find_clocks
from fmdeploy.jetson.machine import is_jetson, power_mode
from fmdeploy.jetson.memory import Memory, ProcessMemory, read_memory, read_process
from fmdeploy.jetson.overcurrent import find_counters, read_counters
from fmdeploy.jetson.thermal import find_slowing, find_zones, read_slowing


@dataclass(frozen=True)
class Snapshot:
    """One moment. What could not be read is None or left out, never 0.

    Attributes:
        at_ns: When, on the monotonic clock.
        memory: Memory of the machine.
        process: Memory of the watched process; None without one.
        temperatures_c: Thermal zone to temperature.
        hot: Zones at or above the point where the board slows itself down, with both temperatures.
        margin_c: Distance of the zone that is nearest to its limit, negative beyond; None where no zone has one.
        clocks_mhz: `cpu0` …, `gpu` to rate.
        pushed_down: Clocks below the floor that was set for them.
        ceilings_mhz: The highest rates allowed now.
        gpu_load_percent: None when unknown.
        events: Counters of throttling, `oc1` to `oc3` on a Jetson.
        slowing: Cooling devices that slow the board, to their state.
        power_mode: Name of the mode that was set last; None when unknown.
    """

    at_ns: int
    memory: Memory = field(default_factory=Memory)
    process: ProcessMemory | None = None
    temperatures_c: dict[str, float] = field(default_factory=dict)
    hot: dict[str, tuple[float, float]] = field(default_factory=dict)
    margin_c: float | None = None
    clocks_mhz: dict[str, float] = field(default_factory=dict)
    pushed_down: dict[str, tuple[float, float]] = field(default_factory=dict)
    ceilings_mhz: dict[str, float] = field(default_factory=dict)
    gpu_load_percent: float | None = None
    events: dict[str, int] = field(default_factory=dict)
    slowing: dict[str, int] = field(default_factory=dict)
    power_mode: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self)


class Probe:
    """Knows which files this board has, so that taking a snapshot is a few reads."""

    def __init__(self, root: Path = Path("/"), pid: int | None = None) -> None:
        """Look once at what is there below `root`; `pid` is a process whose memory is of interest."""
        self.root, self.pid = root, pid
        self.board = is_jetson(root)
        self.look()

    def look(self) -> None:
        """Find all files anew: a GPU's node appears late, a core that comes online has a clock again."""
        self._zones, self._clocks = find_zones(self.root), find_clocks(self.root)
        self._counters, self._slowing = find_counters(self.root), find_slowing(self.root)

    def take(self) -> Snapshot:
        """Read everything now."""
        heat, hot, margin = self._heat()
        clocks = {clock.name: clock.mhz() for clock in self._clocks}
        ceilings = {clock.name: clock.ceiling_mhz() for clock in self._clocks}
        loads = [clock.load_percent() for clock in self._clocks if clock.load is not None]
        return Snapshot(
            at_ns=time.monotonic_ns(),
            memory=read_memory(self.root),
            process=None if self.pid is None else read_process(self.pid, self.root),
            temperatures_c=heat,
            hot=hot,
            margin_c=margin,
            clocks_mhz=_known(clocks),
            pushed_down=self._pushed_down(clocks),
            ceilings_mhz=_known(ceilings),
            gpu_load_percent=loads[0] if loads else None,
            events=read_counters(self._counters),
            slowing=read_slowing(self._slowing),
            power_mode=power_mode(self.root),
        )

    def _heat(self) -> tuple[dict[str, float], dict[str, tuple[float, float]], float | None]:
        heat: dict[str, float] = {}
        hot, margins = {}, []
        for zone in self._zones:
            found = zone.celsius()
            if found is None:
                continue
            heat[zone.name] = max(found, heat.get(zone.name, found))
            if zone.limit_c is not None:
                margins.append(zone.limit_c - found)
                if found >= zone.limit_c:
                    hot[zone.name] = found, zone.limit_c
        return heat, hot, min(margins, default=None)

    def _pushed_down(self, clocks: dict[str, float | None]) -> dict[str, tuple[float, float]]:
        found = {}
        for clock in self._clocks:
            now, floor = clocks[clock.name], clock.floor_mhz()
            if now and floor and now < DIP * floor:  # 0: without power, not slow
                found[clock.name] = now, floor
        return found


def _known(values: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}
