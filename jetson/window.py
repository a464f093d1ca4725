"""What telemetry saw between two moments: peaks, extremes, and how far the counters moved."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from fmdeploy.jetson.overcurrent import deltas
from fmdeploy.jetson.snapshot import Snapshot

NS_PER_S = 1e9


@dataclass
class Window:
    """A summary of snapshots. None, or an absent name, means that it was not known; it is never 0 for that.

    Attributes:
        samples: Snapshots in it.
        seconds: Time from the first to the last.
        longest_gap_ms: Longest time between two snapshots: what happened in between was not seen.
        board: Whether this is a Jetson.
        temperatures_c: Highest temperature a zone.
        hot: Zones that reached their limit: highest temperature and limit.
        clocks_mhz: Lowest and highest rate a clock.
        pushed_down: Clocks that fell below their floor: lowest rate and floor.
        ceilings_mhz: Lowest and highest of the rates that were allowed.
        gpu_load_percent: Highest load.
        events: How many throttling events came.
        slowing: Highest state of every cooling device that slows the board.
        power_modes: Modes that were seen, in order.
        swap_ins: Pages that came back from swap.
        swap_used_mib: Largest swap in use.
        used_delta_mib: Peak of MemTotal − MemAvailable over what it was at the start.
        nvmap_delta_mib: Peak of NvMapMemUsed over what it was at the start.
        process_peak_mib: VmHWM of the watched process.
        process_pss_mib: Peak of its PSS.
        tegrastats: `absent`, `ok`, `silent`, `garbage` or `exited`.
        rails_mw: Lowest and highest power a rail, from tegrastats.
    """

    samples: int = 0
    seconds: float = 0.0
    longest_gap_ms: float = 0.0
    board: bool = False
    temperatures_c: dict[str, float] = field(default_factory=dict)
    hot: dict[str, tuple[float, float]] = field(default_factory=dict)
    clocks_mhz: dict[str, tuple[float, float]] = field(default_factory=dict)
    pushed_down: dict[str, tuple[float, float]] = field(default_factory=dict)
    ceilings_mhz: dict[str, tuple[float, float]] = field(default_factory=dict)
    gpu_load_percent: float | None = None
    events: dict[str, int] = field(default_factory=dict)
    slowing: dict[str, int] = field(default_factory=dict)
    power_modes: list[str] = field(default_factory=list)
    swap_ins: int | None = None
    swap_used_mib: float | None = None
    used_delta_mib: float | None = None
    nvmap_delta_mib: float | None = None
    process_peak_mib: float | None = None
    process_pss_mib: float | None = None
    tegrastats: str = "absent"
    rails_mw: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def rate_hz(self) -> float | None:
        """Snapshots a second; None for fewer than two."""
        return (self.samples - 1) / self.seconds if self.samples > 1 and self.seconds > 0 else None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {**asdict(self), "rate_hz": self.rate_hz}


class Accumulator:
    """Adds snapshots to a window."""

    def __init__(self, *, board: bool) -> None:
        self.window = Window(board=board)
        self._first: Snapshot | None = None
        self._last: Snapshot | None = None

    def add(self, now: Snapshot) -> None:
        """Add one snapshot."""
        first, last, window = self._first or now, self._last or now, self.window
        window.samples += 1
        window.seconds = (now.at_ns - first.at_ns) / NS_PER_S
        window.longest_gap_ms = max(window.longest_gap_ms, (now.at_ns - last.at_ns) / 1e6)
        self._extremes(now)
        self._counts(first, now)
        self._memory(first, now)
        self._first, self._last = first, now

    def _extremes(self, now: Snapshot) -> None:
        window = self.window
        for name, celsius in now.temperatures_c.items():
            window.temperatures_c[name] = max(celsius, window.temperatures_c.get(name, celsius))
        for name, (celsius, limit) in now.hot.items():
            window.hot[name] = max(celsius, window.hot.get(name, (celsius, limit))[0]), limit
        for name, (mhz, floor) in now.pushed_down.items():
            window.pushed_down[name] = min(mhz, window.pushed_down.get(name, (mhz, floor))[0]), floor
        for source, target in ((now.clocks_mhz, window.clocks_mhz), (now.ceilings_mhz, window.ceilings_mhz)):
            for name, mhz in source.items():
                low, high = target.get(name, (mhz, mhz))
                target[name] = min(low, mhz), max(high, mhz)
        for name, state in now.slowing.items():
            window.slowing[name] = max(state, window.slowing.get(name, state))
        window.gpu_load_percent = largest(window.gpu_load_percent, now.gpu_load_percent)

    def _counts(self, first: Snapshot, now: Snapshot) -> None:
        window = self.window
        window.events = deltas(first.events, now.events)
        before, after = first.memory.swapped_in_pages, now.memory.swapped_in_pages
        window.swap_ins = None if before is None or after is None else after - before
        if now.power_mode is not None and now.power_mode not in window.power_modes[-1:]:
            window.power_modes.append(now.power_mode)

    def _memory(self, first: Snapshot, now: Snapshot) -> None:
        window, memory = self.window, now.memory
        window.used_delta_mib = largest(window.used_delta_mib, minus(memory.used_mib, first.memory.used_mib))
        window.nvmap_delta_mib = largest(window.nvmap_delta_mib, minus(memory.nvmap_mib, first.memory.nvmap_mib))
        window.swap_used_mib = largest(window.swap_used_mib, minus(memory.swap_total_mib, memory.swap_free_mib))
        if now.process is not None:
            window.process_peak_mib = largest(window.process_peak_mib, now.process.peak_mib)
            window.process_pss_mib = largest(window.process_pss_mib, now.process.pss_mib)


def largest(one: float | None, other: float | None) -> float | None:
    """Return the larger of those that are known."""
    known = [value for value in (one, other) if value is not None]
    return max(known, default=None)


def minus(one: float | None, other: float | None) -> float | None:
    """Return a difference; None where either side is unknown."""
    return None if one is None or other is None else one - other
