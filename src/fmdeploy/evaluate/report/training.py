"""Section on training: the loss curves of every network that was trained."""

from __future__ import annotations

import numpy as np

from fmdeploy.evaluate.plots.figure import Picture
from fmdeploy.evaluate.plots.training import History, plot_training
from fmdeploy.evaluate.report.sources import Sources, read_history
from fmdeploy.manifest import Kind

MAX_PANELS = 4


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
