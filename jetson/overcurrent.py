"""Counters of hardware throttling, which no temperature and no line of tegrastats shows."""

from __future__ import annotations

from pathlib import Path

from fmdeploy.jetson.reading import children, read_int, read_word

HWMON = Path("sys/class/hwmon")
CPUS = Path("sys/devices/system/cpu")
MEANING = {"oc1": "under-voltage", "oc2": "average over-current", "oc3": "instantaneous over-current"}


def find_counters(root: Path = Path("/")) -> dict[str, Path]:
    """Return the files that count events: `oc1` to `oc3` of soctherm_oc on a Jetson, core throttling on a PC.

    The number of a hwmon differs from start to start, so the chip is found by its name.
    """
    found: dict[str, Path] = {}
    for chip in children(root / HWMON, "hwmon*"):
        if read_word(chip / "name") == "soctherm_oc":
            found |= {path.name.removesuffix("_event_cnt"): path for path in children(chip, "oc*_event_cnt")}
    for path in children(root / CPUS, "cpu[0-9]*/thermal_throttle/core_throttle_count"):
        found[f"{path.parent.parent.name}_throttle"] = path
    return found


def read_counters(files: dict[str, Path]) -> dict[str, int]:
    """Return every counter that can be read."""
    counts = {name: read_int(path) for name, path in files.items()}
    return {name: count for name, count in counts.items() if count is not None}


def deltas(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """Return how many events came between, for counters that were there both times."""
    return {name: after[name] - before[name] for name in before if name in after}


def meaning(counter: str) -> str:
    """Return a counter's name with what it counts."""
    return f"{counter} ({MEANING[counter]})" if counter in MEANING else counter
