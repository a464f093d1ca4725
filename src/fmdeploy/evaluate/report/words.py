"""Numbers as the page prints them."""

from __future__ import annotations

import math

from fmdeploy.evaluate.bootstrap import Interval

MINUS = "−"
NO_ERROR_DB = 999.0  # how a check writes a ratio with nothing in the denominator


def number(value: float | None, digits: int = 3) -> str:
    """A plain number; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", MINUS)


def signed(value: float, digits: int = 4) -> str:
    """A plain number that always shows its sign."""
    return f"{value:+.{digits}f}".replace("-", MINUS)


def percent(value: float | None, digits: int = 2) -> str:
    """A fraction as a percentage."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.{digits}f} %".replace("-", MINUS)


def quantity(value: float | None, unit: str) -> str:
    """A value with its unit; fractions (unit `1`) as percentages."""
    if value is None or not math.isfinite(value):
        return "–"
    if unit == "1":
        return percent(value)
    if unit == "dB" and value >= NO_ERROR_DB:
        return "identical"
    return f"{value:.4g} {unit}".replace("-", MINUS)


def span(low: float, high: float, unit: str = "1") -> str:
    """An interval."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return "–"
    return f"[{quantity(low, unit)}, {quantity(high, unit)}]"


def estimate_text(interval: Interval, *, relative: bool) -> str:
    """A value with its interval: percentages of a relative drop, points of an absolute one."""
    if relative:
        return f"{percent(interval.value)} {span(interval.low, interval.high)}"
    return f"{number(interval.value, 4)} [{number(interval.low, 4)}, {number(interval.high, 4)}]"


def count(value: int) -> str:
    """An integer with thin groups of three digits."""
    return f"{value:,}".replace(",", "\u202f")


def mebibytes(size: int) -> str:
    """A file size."""
    return f"{size / 2**20:.2f} MiB"
