"""Section on probes: the ladders of all networks side by side, and how cheap rungs grew while a teacher was trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmdeploy.artifact import Artifact
from fmdeploy.evaluate.plots.figure import Picture
from fmdeploy.evaluate.plots.probes import Growth, plot_probes
from fmdeploy.evaluate.report.sources import Sources
from fmdeploy.evaluate.report.words import number, quantity, signed
from fmdeploy.manifest import Kind

LADDER, CURVE = "probe.json", "probes.json"
LOOKS = ("teacher", "student", "int8", "scratch", "other")


@dataclass(frozen=True)
class ProbeCell:
    """One network on one rung; `reason` is set where it was not measured."""

    value: str
    interval: str = "–"
    random: str = "–"
    gain: str = "–"
    reason: str = ""


@dataclass(frozen=True)
class ProbeRow:
    """One rung: a cell for each network."""

    rung: str
    metric: str
    cells: tuple[ProbeCell, ...]


@dataclass(frozen=True)
class Probes:
    """The section; either part may be missing."""

    networks: tuple[str, ...]
    rows: tuple[ProbeRow, ...]
    curve: Picture | str


def probes_section(sources: Sources) -> Probes | None:
    """The table and the curve; None where neither was made: what ships needs no probes."""
    ladders = [a for a in sources.artifacts if a.kind is Kind.PROBE]
    trained = [a for a in sources.artifacts if a.kind is Kind.TEACHER and a.has(CURVE)]
    if not ladders and not trained:
        return None
    found = [artifact.json(LADDER) for artifact in ladders]
    names = tuple(f"{a.root.resolve().name} ({each['model']['name']})" for a, each in zip(ladders, found, strict=True))
    return Probes(names, _rows([each["rungs"] for each in found]), _curve(trained))


def _rows(ladders: Sequence[dict[str, Any]]) -> tuple[ProbeRow, ...]:
    """Rungs in the order of their first mention; a network that was not asked for one has an empty cell."""
    rungs = {rung: row["metric"] for ladder in ladders for rung, row in ladder.items()}
    return tuple(ProbeRow(rung, metric, tuple(_cell(ladder.get(rung)) for ladder in ladders))
                 for rung, metric in rungs.items())


def _cell(row: dict[str, Any] | None) -> ProbeCell:
    if row is None:
        return ProbeCell("–", reason="not asked for")
    if row["value"] is None:
        return ProbeCell("–", reason=f"not measured: {row['reason']}")
    value = number(row["value"]) if row["unit"] == "1" else quantity(row["value"], row["unit"])
    gain = row["gain"] or {}
    said = f"{signed(gain['value'], 3)} {_ends(gain)}" if gain.get("value") is not None else "–"
    return ProbeCell(value, _ends(row), number((row["baseline"] or {}).get("value")), said)


def _ends(row: dict[str, Any]) -> str:
    return "–" if row["low"] is None else f"[{number(row['low'])}, {number(row['high'])}]"


def _curve(trained: Sequence[Artifact]) -> Picture | str:
    growths: list[Growth] = []
    metrics: dict[str, str] = {}
    for artifact, look in zip(trained, LOOKS, strict=False):
        series = {rung: row for rung, row in artifact.json(CURVE).items()
                  if any(point[1] is not None for point in row["points"])}
        metrics.update({rung: row["metric"] for rung, row in series.items()})
        growths.append(Growth(artifact.root.resolve().name, look,
                              {rung: np.array(row["points"], np.float64).T for rung, row in series.items()}))
    if not metrics:
        return "no TEACHER that was trained with --probe-every"
    return plot_probes(growths, metrics)
