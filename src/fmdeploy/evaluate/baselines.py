"""What no network is needed for: the task's trivial predictions, judged like any model.

A number such as IoU 0.31 says nothing alone; beside "copy what the sensors see now" it does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fmdeploy.arrays import Arrays
from fmdeploy.evaluate.evaluation import Evaluation, evaluate

if TYPE_CHECKING:
    from fmdeploy.task import Samples, Task


def baselines_of(task: Task) -> dict[str, Callable[[Arrays], Arrays]]:
    """The task's `baselines()`: name → predict function, inputs (B, ...) to outputs (B, ...); none by default."""
    found = getattr(task, "baselines", None)
    return dict(found()) if found is not None else {}


def evaluate_baselines(task: Task, samples: Samples, *, data: str = "") -> dict[str, Evaluation]:
    """Judge every trivial prediction of `task` on `samples`.

    Args:
        task: May define `baselines() -> dict[str, Callable[[Arrays], Arrays]]`.
        samples: What to evaluate on.
        data: Identity of the samples, `<dataset digest>:<split>`, as given to the models' evaluations.

    Returns:
        Name → evaluation, in the task's order.
    """
    metrics = task.metrics()
    return {name: evaluate(predict, samples, metrics, data=data) for name, predict in baselines_of(task).items()}
