"""Under which conditions something was measured: power mode, clocks, temperatures, throttling, swap.

A run during which the board throttled, swapped or changed its mode measured another machine; one that nobody watched
measured nobody knows what. Neither can keep a budget.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fmdeploy.environment import describe_environment
from fmdeploy.jetson.machine import board_model, is_jetson, l4t_release
from fmdeploy.jetson.power import Power, read_power
from fmdeploy.jetson.taint import taints, unknowns
from fmdeploy.jetson.telemetry import Telemetry
from fmdeploy.jetson.window import Window

T = TypeVar("T")


@dataclass(frozen=True)
class Conditions:
    """What was so while something was measured.

    Attributes:
        root: Where /proc, /sys and the board's tools were read.
        window: What telemetry saw; None when it says nothing.
        power: Power mode before and after; a PC has none.
        tainted: What makes the numbers worthless.
        unknown: Facts that a budget row must have and nobody knows.
    """

    root: Path
    window: Window | None
    power: tuple[Power, Power] | None
    tainted: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def why_not(self) -> str:
        """Why no budget can be kept under these conditions; empty when one can."""
        if self.tainted:
            return f"tainted: {'; '.join(self.tainted)}"
        return "; ".join(self.unknown)

    def against(self, power_mode: str | None) -> str:
        """Why a budget for the power mode with this name cannot be kept; empty when it can."""
        if self.why_not or power_mode is None:
            return self.why_not
        if self.power is None:
            return f"the budget is for power mode {power_mode}, this machine has none"
        return self.power[0].against(power_mode)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        mode = self.power[1].mode if self.power else None
        return {
            "root": str(self.root),
            "power_mode": mode.__dict__ if mode else None,
            "tainted": list(self.tainted),
            "unknown": list(self.unknown),
            **(self.window.to_json() if self.window else {}),
        }

    def lines(self) -> list[str]:
        """Return what a person wants to know, in one line; another one when the run is worthless."""
        window = self.window or Window()
        mode = self.power[1].mode if self.power else None
        facts = [
            f"power mode {mode}" if mode else "power mode unknown" if window.board else "",
            _spans("clocks", window.clocks_mhz, "MHz"),
            _peaks(window.temperatures_c),
            _counts(window.events),
            f"swap-ins {'unknown' if window.swap_ins is None else window.swap_ins}",
            "" if window.rate_hz is None else f"watched at {window.rate_hz:.0f} Hz",
        ]
        where = "" if self.root == Path("/") else f" (read below {self.root})"
        line = f"conditions{where}: {'; '.join(fact for fact in facts if fact)}"
        return [line, *([f"NOT a measurement: {self.why_not}"] if self.why_not else [])]


def _spans(name: str, values: dict[str, tuple[float, float]], unit: str) -> str:
    cpus = [pair for key, pair in values.items() if key != "gpu"]
    found = [("cpu", min(low for low, _ in cpus), max(high for _, high in cpus))] if cpus else []
    found += [("gpu", *values["gpu"])] if "gpu" in values else []
    texts = [f"{key} {low:.0f}" + (f"–{high:.0f}" if high > low else "") for key, low, high in found]
    return f"{name} {', '.join(texts)} {unit}" if texts else ""


def _peaks(values: dict[str, float]) -> str:
    if not values:
        return ""
    name = max(values, key=lambda key: values[key])
    return f"hottest {name} {values[name]:.1f} °C"


def _counts(values: dict[str, int]) -> str:
    named = {name: count for name, count in values.items() if name.startswith("oc") or count}
    return "throttling " + ", ".join(f"{name} {count:+d}" for name, count in named.items()) if named else ""


def watched(
    work: Callable[[], T], root: Path = Path("/"), telemetry: Telemetry | None = None
) -> tuple[T, Conditions]:
    """Do some work and watch the machine meanwhile, from another process.

    Args:
        work: What is measured.
        root: Folder below which /proc, /sys and the board's tools are; another than / for tests.
        telemetry: Watches `root` already; None: one is started for this work alone.
    """
    board = is_jetson(root)
    before = read_power(root) if board else None
    with nullcontext(telemetry) if telemetry else Telemetry(root) as eyes:
        eyes.begin()
        result = work()
        window = eyes.end()
    after = read_power(root) if board else None
    power = None if before is None or after is None else (before, after)
    return result, Conditions(root, window, power, *_judge(window, power))


def _judge(window: Window | None, power: tuple[Power, Power] | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    tainted, unknown = (taints(window) if window else []), unknowns(window)
    if power is not None:
        before, after = power
        problem = next((side.problem for side in power if side.mode is None), "")
        if problem:
            unknown.append(f"the power mode is unknown: {problem}")
        elif before.mode != after.mode:
            tainted.append(f"the power mode changed from {before.mode} to {after.mode}")
        tainted += [*before.contradictions, *after.contradictions]
    return tuple(dict.fromkeys(tainted)), tuple(dict.fromkeys(unknown))


def describe_machine(root: Path = Path("/")) -> dict[str, Any]:
    """Return what a measurement depends on: processor, packages, and on a Jetson its release and model."""
    return {**describe_environment(), "l4t": l4t_release(root), "board": board_model(root)}
