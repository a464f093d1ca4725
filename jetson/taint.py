"""Is a measurement worth anything? Not while the board throttled, swapped or changed its mode, nor while nobody looked.

    tainted       something happened that makes the numbers those of another machine
    not known     a fact is missing that a budget row must name; it is no pass either
"""

from __future__ import annotations

from fmdeploy.jetson.overcurrent import meaning
from fmdeploy.jetson.window import Window

MAX_GAP_MS = 1000.0  # a telemetry that slept this long may have slept through anything
OVERCURRENT = ("oc1", "oc2", "oc3")


def taints(window: Window) -> list[str]:
    """Return what happened during a run that makes its numbers worthless, one line each."""
    found = [f"{meaning(name)}: {count} events" for name, count in window.events.items() if count != 0]
    found += [f"{name} reached {celsius:.1f} °C, the board slows itself down at {limit:.1f} °C"
              for name, (celsius, limit) in window.hot.items()]
    found += [f"cooling by {name} was on, state {state}" for name, state in window.slowing.items() if state > 0]
    if window.board:  # an idle core of a PC may well report less than its floor
        found += [f"{name} fell to {mhz:.0f} MHz, below its floor of {floor:.0f} MHz"
                  for name, (mhz, floor) in window.pushed_down.items()]
    found += [f"the ceiling of {name} moved between {low:.0f} and {high:.0f} MHz"
              for name, (low, high) in window.ceilings_mhz.items() if low != high]
    if window.swap_ins:
        found.append(f"{window.swap_ins} pages came back from swap")
    if len(window.power_modes) > 1:
        found.append(f"the power mode changed: {' → '.join(window.power_modes)}")
    return found


def unknowns(window: Window | None) -> list[str]:
    """Return what a budget row must name and nobody knows; a PC need not have what only a board has."""
    if window is None or window.samples < 2:
        return ["telemetry says nothing"]
    found = []
    if window.swap_ins is None:
        found.append("swap-ins are unknown")
    return found + (_unknown_on_a_board(window) if window.board else [])


def _unknown_on_a_board(window: Window) -> list[str]:
    found = []
    if window.longest_gap_ms > MAX_GAP_MS:
        found.append(f"telemetry did not look for {window.longest_gap_ms:.0f} ms")
    if not window.temperatures_c:
        found.append("temperatures are unknown")
    if not window.clocks_mhz:
        found.append("clocks are unknown")
    if missing := [name for name in OVERCURRENT if name not in window.events]:
        found.append(f"over-current counters are unknown: {', '.join(missing)}")
    if not window.power_modes:
        found.append("the power mode is unknown")
    return found
