"""How good a quantised student is, beside the float student and the teacher that it came from.

    evaluation, validation            of the quantised student, on the test and validation splits
    student_evaluation, student_…     of the float student, copied from the STUDENT (or measured, if it has none)
    teacher_evaluation, teacher_…     of the teacher, copied
Each is a pair of files, .json and .safetensors.
"""

from __future__ import annotations

import math
import shutil
from typing import Any

from fmdeploy.artifact import Artifact
from fmdeploy.data.format import Dataset
from fmdeploy.draft import Draft
from fmdeploy.evaluate.evaluation import Evaluation, Predict, data_key, evaluate
from fmdeploy.evaluate.examples import save_examples
from fmdeploy.task import Metric, Task

NAMES = {"val": "validation", "test": "evaluation"}
SUFFIXES = (".json", ".safetensors")

Values = dict[str, float | None]


def held_out_splits(data: Dataset) -> list[str]:
    """The splits for judging that this dataset has."""
    return [split for split in NAMES if data.splits.get(split)]


def judge(
    draft: Draft, predict: Predict, task: Task, data: Dataset, *, prefix: str = "", examples: bool = False
) -> dict[str, Values]:
    """Evaluate on every held-out split and save it as `<prefix>evaluation` and `<prefix>validation`.

    Returns:
        Split → metric → value, null where it is undefined.
    """
    found = {}
    for split in held_out_splits(data):
        samples = task.samples(data, split)
        result = evaluate(predict, samples, task.metrics(), data=data_key(data.digest, split))
        result.save(draft, prefix + NAMES[split])
        found[split] = metric_values(result, task.metrics())
        if examples and split == "test":
            save_examples(draft, predict, samples)
    return found


def carry_over(draft: Draft, parent: Artifact, task: Task, data: Dataset, float_student: Predict) -> dict[str, Values]:
    """Copy the teacher's evaluations, and copy or make those of the float student; returns the latter's values.

    An evaluation on other samples than those of `data` is not copied: it would be compared with the wrong thing.
    """
    _copy(draft, parent, {f"teacher_{name}": f"teacher_{name}" for name in NAMES.values()}, data)
    own = "student_" if has_evaluation(parent, "student_evaluation") else ""
    copied = _copy(draft, parent, {f"{own}{name}": f"student_{name}" for name in NAMES.values()}, data)
    wanted = {f"student_{NAMES[split]}": split for split in held_out_splits(data)}
    if not set(wanted) <= set(copied):
        return judge(draft, float_student, task, data, prefix="student_")
    return {split: metric_values(copied[name], task.metrics()) for name, split in wanted.items()}


def has_evaluation(artifact: Artifact, name: str) -> bool:
    """Whether the artifact carries the evaluation `name`."""
    return all(artifact.has(name + suffix) for suffix in SUFFIXES)


def _copy(draft: Draft, parent: Artifact, names: dict[str, str], data: Dataset) -> dict[str, Evaluation]:
    copied = {}
    for source, target in names.items():
        if not has_evaluation(parent, source):
            continue
        evaluation = Evaluation.load(parent, source)
        if evaluation.data.rpartition(":")[0] == data.digest:
            for suffix in SUFFIXES:
                shutil.copyfile(parent.path(source + suffix), draft.path(target + suffix))
            copied[target] = evaluation
    return copied


def metric_values(evaluation: Evaluation, metrics: tuple[Metric, ...]) -> Values:
    """Every metric's value; null where it is undefined."""
    values = {metric.name: evaluation.value(metric) for metric in metrics}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def relative_drop(reference: dict[str, Values], candidate: dict[str, Values], metric: Metric) -> dict[str, Any]:
    """How much worse `candidate` is, relative to `reference`, on each split: negative where it is better.

    Null where it is undefined.
    """
    sign = 1.0 if metric.higher_is_better else -1.0
    drops: dict[str, Any] = {}
    for split in candidate:
        before, after = reference.get(split, {}).get(metric.name), candidate[split].get(metric.name)
        drops[split] = None if not before or after is None else sign * (before - after) / before
    return drops
