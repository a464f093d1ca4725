"""The ladder as a table in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fmdeploy.evaluate.frequency import MIN_GROUPS

HEAD = ("rung", "metric", "value", "interval", "random", "gain", "n")
NONE = "–"


def table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of a Markdown table; a row that was not measured says why."""
    lines = [_line(HEAD), _line(["---"] * len(HEAD)), *(_line(_cells(name, row)) for name, row in rows.items())]
    few = [name for name, row in rows.items() if row["low"] is not None and row["groups"] < MIN_GROUPS]
    if few:
        lines += ["", f"Intervals from fewer than {MIN_GROUPS} simulations are too narrow: {', '.join(few)}"]
    return lines


def _cells(name: str, row: Mapping[str, Any]) -> list[str]:
    metric = row["metric"] if row["unit"] == "1" else f"{row['metric']}, {row['unit']}"
    if row["result"] != "measured":
        return [name, metric, f"{row['result']}: {row['reason']}", NONE, NONE, NONE, NONE]
    gain = row["gain"]
    return [name, metric, number(row["value"]), interval(row), number((row["baseline"] or {}).get("value")),
            f"{number(gain['value'], signed=True)} {interval(gain)}" if gain else NONE, str(row["n"])]


def interval(row: Mapping[str, Any]) -> str:
    """`[low, high]`, or a dash."""
    return NONE if row["low"] is None else f"[{number(row['low'])}, {number(row['high'])}]"


def number(value: float | None, *, signed: bool = False) -> str:
    """Four significant digits, or a dash."""
    if value is None:
        return NONE
    return f"{value:+.4f}" if signed else f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
