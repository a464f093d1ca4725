"""What probes are trained on: the class and the planes of a task, found in its specification.

Legend: N samples, C planes, H W cells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.evaluate.metrics import Accuracy
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
    """Class int64 (N,) of each sample: what the task's accuracy is judged by, else a target named as a vector output.

    Raises:
        NotMeasuredError: the task has none.
    """
    label = targets.get(_class_names(task)[1])
    if label is None or label.ndim != 1 or label.dtype.kind not in "iu":
        raise NotMeasuredError("the task has no class label")
    return np.asarray(label, np.int64)


def class_count(task: Task) -> int:
    """Number of classes of that label."""
    output = _class_names(task)[0]
    return next(spec.shape[0] for spec in task.io.outputs if spec.name == output)


def _class_names(task: Task) -> tuple[str, str]:
    """Output and target of the classes."""
    judged = [(metric.output, metric.target) for metric in task.metrics() if isinstance(metric, Accuracy)]
    vectors = [(spec.name, spec.name) for spec in task.io.outputs if len(spec.shape) == 1]
    return next(iter([*judged, *vectors]), ("", ""))


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
