"""What no network is needed for: the task's trivial predictions, judged like any model.

A number such as IoU 0.31 says nothing alone; beside "copy what the sensors see now" it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fmdeploy.evaluate.evaluation import Evaluation, evaluate

if TYPE_CHECKING:
    from fmdeploy.task import Samples, Task


def evaluate_baselines(task: Task, samples: Samples, *, data: str = "") -> dict[str, Evaluation]:
    """Judge every trivial prediction of `task` on `samples`.

    Args:
        task: Its `baselines()` are judged.
        samples: What to evaluate on.
        data: Identity of the samples, `<dataset digest>:<split>`, as given to the models' evaluations.

    Returns:
        Name → evaluation, in the task's order.
    """
    metrics = task.metrics()
    return {name: evaluate(predict, samples, metrics, data=data) for name, predict in task.baselines().items()}
