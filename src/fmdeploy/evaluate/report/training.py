"""Section on training: the loss curves of every network that was trained, and how long it waited for data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from fmdeploy.evaluate.plots.figure import Picture
from fmdeploy.evaluate.plots.training import History, plot_training
from fmdeploy.evaluate.report.sources import Sources, read_history
from fmdeploy.manifest import Kind

MAX_PANELS = 4
NOTED = ("steps", "steps_per_s", "data_wait_share", "processes")


class PaceRow(NamedTuple):
    """How fast one network was trained by the process run that sealed it."""

    name: str
    steps: int
    rate: float
    waited: float
    processes: int


def pace_rows(sources: Sources) -> Iterator[PaceRow]:
    """A row for each network whose manifest says how fast it was trained."""
    for model in sources.models:
        noted: Any = model.artifact.manifest.environment.get("training") if model.artifact is not None else None
        if isinstance(noted, dict) and all(isinstance(noted.get(name), int | float) for name in NOTED):
            yield PaceRow(model.name, *(noted[name] for name in NOTED))


def training_section(sources: Sources) -> Picture | str:
    """One panel for each TEACHER and STUDENT with a log, or why there is none."""
    histories = []
    for model in sources.models:
        if model.artifact is None or model.artifact.kind not in (Kind.TEACHER, Kind.STUDENT):
            continue
        found = read_history(model.artifact)
        if found:
            series = {name: np.asarray(points, np.float64).T for name, points in found.items()}
            histories.append(History(model.name, model.look, series))
    return plot_training(histories[:MAX_PANELS]) if histories else "no TEACHER or STUDENT with a loss curve"
