"""Section on mixed precision: what every layer costs in INT8, and which ones were kept in float for how much time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import nan
from typing import Any

from fmdeploy.artifact import Artifact
from fmdeploy.evaluate.plots.figure import Picture
from fmdeploy.evaluate.plots.precision import Bar, Point, plot_pareto, plot_sensitivity
from fmdeploy.evaluate.report.sources import Sources
from fmdeploy.evaluate.report.words import count, percent
from fmdeploy.manifest import Kind

SENSITIVITY, SEARCH = "sensitivity.json", "search.json"


@dataclass(frozen=True)
class Precision:
    """The section: sensitivity, on how many samples, and where layers were searched for, candidates and decision."""

    sensitivity: Picture
    samples: str
    pareto: Picture | None = None
    decision: str = ""


def precision_section(sources: Sources) -> Precision | None:
    """What a QUANTIZED measured of its layers; None where none did."""
    made = next((a for a in sources.artifacts if a.kind is Kind.QUANTIZED and a.has(SENSITIVITY)), None)
    if made is None:
        return None
    found = Precision(_sensitivity(made), f"{count(made.json(SENSITIVITY)['samples'])} samples of the validation split")
    return replace(found, pareto=_pareto(made), decision=_decision(made)) if made.has(SEARCH) else found


def _sensitivity(made: Artifact) -> Picture:
    found = made.json(SENSITIVITY)
    bars = [Bar(row["name"], _worst(row["alone"]), row["alone"]["drop"], row["without"]["drop"])
            for row in found["rows"]]
    return plot_sensitivity(found["metric"], sorted(bars, key=lambda bar: bar.alone_db), found["everything"]["drop"])


def _worst(effect: Mapping[str, Any]) -> float:
    return float(min(effect["sqnr_db"].values()))


def _pareto(made: Artifact) -> Picture:
    found = made.json(SEARCH)
    points = [_point(row, k in found["front"], row["keep_float"] == found["chosen"]["keep_float"])
              for k, row in enumerate(found["tried"]) if row["effect"]["drop"] is not None]
    return plot_pareto(found["metric"], points, found["max_drop"], found["device"])


def _point(row: Mapping[str, Any], on_front: bool, chosen: bool) -> Point:
    low, high = (nan if row["effect"][end] is None else row["effect"][end] for end in ("low", "high"))
    return Point(row["microseconds"], row["effect"]["drop"], low, high, len(row["keep_float"]), on_front, chosen)


def _decision(made: Artifact) -> str:
    found = made.json(SEARCH)
    chosen = found["chosen"]
    kept = ", ".join(chosen["keep_float"]) or "nothing"
    fastest = min(row["microseconds"] for row in found["tried"])
    verdict = "within" if found["reached"] else "not within"
    return (f"Kept in float for the metric: {kept}. Drop {percent(chosen['effect']['drop'])} on the validation split, "
            f"{verdict} the limit of {percent(found['max_drop'])}; predicted {chosen['microseconds']:.0f} µs, "
            f"{chosen['microseconds'] / fastest - 1:.1%} above the fastest candidate")
