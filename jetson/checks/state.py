"""What the board does right now: power mode, clocks, heat, throttling, memory, and whether tegrastats speaks."""

from __future__ import annotations

import time

from fmdeploy.jetson.binaries import ask, find_program
from fmdeploy.jetson.checks.finding import Diagnosis, Severity, Site
from fmdeploy.jetson.clocks import find_clocks, parse_shown
from fmdeploy.jetson.memory import read_memory
from fmdeploy.jetson.overcurrent import find_counters, meaning, read_counters
from fmdeploy.jetson.power import modes, read_power
from fmdeploy.jetson.tegrastream import TegrastatsStream
from fmdeploy.jetson.thermal import find_slowing, find_zones, read_slowing

NEAR_C = 10.0
LOW_MIB, NONE_MIB = 1024.0, 256.0
SPEAK_S = 3.0


def power_mode(site: Site) -> list[Diagnosis]:
    """Power mode by name, and whether it really took effect."""
    if not site.jetson:
        return []
    power = read_power(site.root)
    names = ", ".join(f"{mode.id}={mode.name}" for mode in modes(site.root))
    if power.mode is None:
        return [Diagnosis("power-mode", Severity.UNKNOWN, f"the power mode is unknown: {power.problem}",
                          found=names and f"the table has {names}",
                          fix="Run the doctor on the host; a container has no nvpmodel"
                          if site.container else "Run: sudo nvpmodel -q")]
    if power.contradictions:
        return [Diagnosis("power-mode", Severity.FAIL, "; ".join(power.contradictions), expected=str(power.mode),
                          found=names, fix="Set the mode in a local terminal (not over SSH) and restart: "
                          f"sudo nvpmodel -m {power.mode.id}")]
    return [Diagnosis("power-mode", Severity.OK, f"power mode {power.mode}: clock limits, not a power budget",
                      found=names)]


def clocks(site: Site) -> list[Diagnosis]:
    """Clocks of CPU, GPU and memory, and whether `jetson_clocks` pinned them."""
    if not site.jetson:
        return []
    shown = parse_shown(ask("jetson_clocks", "--show", root=site.root).text or "")
    if shown:
        pinned = [name for name, clock in shown.items() if clock.pinned]
        text = "pinned: " + ", ".join(pinned) if pinned else "governed: single latencies will spread"
        found = ", ".join(f"{name} {clock.now} of {clock.low} to {clock.high}" for name, clock in shown.items())
        return [Diagnosis("clocks", Severity.OK, f"clocks are {text}", found=found,
                          fix="" if pinned else "To measure, pin them with: sudo jetson_clocks")]
    rates = {clock.name: clock.mhz() for clock in find_clocks(site.root)}
    known = ", ".join(f"{name} {mhz:.0f} MHz" for name, mhz in rates.items() if mhz is not None)
    if not known:
        return [Diagnosis("clocks", Severity.UNKNOWN, "no clock can be read here", fix="Run the doctor on the host")]
    return [Diagnosis("clocks", Severity.OK, "clocks can be read", found=known)]


def temperatures(site: Site) -> list[Diagnosis]:
    """Every zone against the point at which the board slows itself down."""
    readings = [(zone, celsius) for zone in find_zones(site.root) if (celsius := zone.celsius()) is not None]
    if not readings:
        return [Diagnosis("temperatures", Severity.UNKNOWN, "no temperature can be read here",
                          fix="Run the doctor on the host")] if site.jetson else []
    found = ", ".join(f"{zone.name} {celsius:.1f} °C" + (f" of {zone.limit_c:.1f}" if zone.limit_c else "")
                      for zone, celsius in readings)
    margins = [(zone.limit_c - celsius, zone.name) for zone, celsius in readings if zone.limit_c is not None]
    margin, name = min(margins, default=(None, ""))
    fix = "Cool the board: clean the fan, `sudo nvpmodel` to a smaller mode, or a better heat sink"
    if margin is not None and margin <= 0:
        return [Diagnosis("temperatures", Severity.FAIL, f"{name} is at its limit: the board slows itself down",
                          expected="below every limit", found=found, fix=fix)]
    if margin is not None and margin < NEAR_C:
        return [Diagnosis("temperatures", Severity.WARN, f"{name} is {margin:.1f} °C below its limit", found=found,
                          expected=f"{NEAR_C:g} °C below every limit", fix=fix)]
    return [Diagnosis("temperatures", Severity.OK, "no zone is near its limit", found=found)]


def throttling(site: Site) -> list[Diagnosis]:
    """Cooling devices that slow the board down now."""
    states = read_slowing(find_slowing(site.root))
    active = {name: state for name, state in states.items() if state > 0}
    if active:
        return [Diagnosis("throttling", Severity.FAIL, f"the board slows itself down: {', '.join(active)}",
                          expected="state 0", found=", ".join(f"{name} {state}" for name, state in active.items()),
                          fix="Cool the board, or choose a smaller power mode; measure nothing until then")]
    return [Diagnosis("throttling", Severity.OK, "nothing slows the board down")] if states else []


def over_current(site: Site) -> list[Diagnosis]:
    """Over-current counters since the start: no temperature and no line of tegrastats shows these events."""
    counts = read_counters(find_counters(site.root))
    if not counts:
        return [Diagnosis("over-current", Severity.UNKNOWN, "there are no over-current counters (soctherm_oc) here",
                          fix="Run the doctor on the host")] if site.jetson else []
    found = ", ".join(f"{meaning(name)} {count}" for name, count in counts.items())
    if any(counts.values()):
        return [Diagnosis("over-current", Severity.WARN, "the hardware throttled for current since the start",
                          expected="0", found=found,
                          fix="Check the power supply and cable, or choose a smaller power mode")]
    return [Diagnosis("over-current", Severity.OK, "no event since the start", found=found)]


def memory(site: Site) -> list[Diagnosis]:
    """Memory that is left, and on an Orin what the GPU has of it."""
    now = read_memory(site.root)
    if now.available_mib is None or now.total_mib is None:
        return [Diagnosis("memory", Severity.UNKNOWN, "MemAvailable cannot be read", fix="Mount /proc")]
    nvmap = "" if now.nvmap_mib is None else f", {now.nvmap_mib:.0f} MiB of it for GPU and engines"
    found = f"{now.available_mib:.0f} of {now.total_mib:.0f} MiB available{nvmap}"
    if now.available_mib < LOW_MIB:
        worst = Severity.FAIL if now.available_mib < NONE_MIB else Severity.WARN
        return [Diagnosis("memory", worst, "little memory is left", expected=f"{LOW_MIB:.0f} MiB or more", found=found,
                          fix="Stop the desktop (sudo systemctl isolate multi-user) and other processes")]
    return [Diagnosis("memory", Severity.OK, found, found=found)]


def swap(site: Site) -> list[Diagnosis]:
    """Swap in use: a page that comes back from it makes a latency, and a measurement, worthless."""
    now = read_memory(site.root)
    if now.swap_total_mib is None or now.swap_free_mib is None:
        return [Diagnosis("swap", Severity.UNKNOWN, "swap cannot be read", fix="Mount /proc")] if site.jetson else []
    used = now.swap_total_mib - now.swap_free_mib
    found = f"{used:.0f} of {now.swap_total_mib:.0f} MiB in use"
    if used > 0:
        return [Diagnosis("swap", Severity.WARN, "memory was swapped out", expected="0 MiB in use", found=found,
                          fix="Free memory, then: sudo swapoff -a && sudo swapon -a")]
    return [Diagnosis("swap", Severity.OK, found, found=found)]


def tegrastats(site: Site) -> list[Diagnosis]:
    """Whether tegrastats prints lines that can be read."""
    if not site.jetson:
        return []
    if find_program("tegrastats", site.root) is None:
        return [Diagnosis("tegrastats", Severity.UNKNOWN, "tegrastats is not here; telemetry reads the kernel's files",
                          fix="Run the doctor on the host")]
    stream, until = TegrastatsStream(site.root), time.monotonic() + SPEAK_S
    while (sample := stream.poll()) is None and stream.state != "exited" and time.monotonic() < until:
        time.sleep(0.02)
    state = stream.state
    stream.close()
    if sample is None:
        return [Diagnosis("tegrastats", Severity.WARN, f"tegrastats says nothing that can be read: {state}",
                          expected="one line a tenth of a second", found=state,
                          fix="Run: tegrastats; telemetry does without it")]
    clock = "EMC and GPU clocks too" if sample.gpu_clocks_mhz else "EMC and GPU clocks are for root only"
    return [Diagnosis("tegrastats", Severity.OK, f"tegrastats speaks; {clock}",
                      found=f"RAM {sample.ram_used_mib}/{sample.ram_total_mib} MiB")]
