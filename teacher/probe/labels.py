"""What probes are trained on: the class and the planes of a task, found in its specification.

Legend: N samples, C planes, H W cells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.task import Task
from fmdeploy.teacher.probe.view import NotMeasuredError

NOW, LATER, GROUND = "t", "+", "drivable"


class Planes(NamedTuple):
    """Channels of one dense output: which of them are occupancy now, later, and drivable ground."""

    output: str
    occupancy: tuple[int, ...]
    forecasting: tuple[int, ...]
    segmentation: tuple[int, ...]


def class_labels(task: Task, targets: Arrays) -> Array:
    """Class int64 (N,) of each sample: the first integer target that is one of a vector output's classes.

    Raises:
        NotMeasuredError: the task has none.
    """
    for spec in task.io.outputs:
        label = targets.get(spec.name)
        if len(spec.shape) == 1 and label is not None and label.ndim == 1 and label.dtype.kind in "iu":
            return np.asarray(label, np.int64)
    raise NotMeasuredError("the task has no class label")


def class_count(task: Task) -> int:
    """Number of classes of that label."""
    return next(spec.shape[0] for spec in task.io.outputs if len(spec.shape) == 1)


def dense_planes(task: Task) -> Planes:
    """Planes by the names of a dense output's channels: `t`, `+…`, `drivable`.

    Raises:
        NotMeasuredError: the task has no dense output with such channels.
    """
    for spec in task.io.outputs:
        names = spec.channels or ()
        found = Planes(spec.name, _numbers(names, lambda n: n == NOW), _numbers(names, lambda n: n.startswith(LATER)),
                       _numbers(names, lambda n: n == GROUND))
        if len(spec.shape) == 3 and (found.occupancy or found.forecasting or found.segmentation):
            return found
    raise NotMeasuredError(f"the task has no planes called {NOW!r}, {LATER!r}… or {GROUND!r}")


def _numbers(names: tuple[str, ...], wanted: Callable[[str], bool]) -> tuple[int, ...]:
    return tuple(number for number, name in enumerate(names) if wanted(name))
