"""What this does and does not prove, in sentences made from the given artifacts and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fmdeploy.evaluate.gates import Result
from fmdeploy.evaluate.report.accuracy import Comparison, comparisons, judged, primary
from fmdeploy.evaluate.report.sources import BASELINE, Sources, labels_of, require_evaluation
from fmdeploy.evaluate.report.words import count, estimate_text, percent, signed, span


def proofs(sources: Sources) -> list[str]:
    """What the numbers support, each with its interval."""
    metric = primary(sources)
    if metric is None:
        return []
    found = [_claim(comparison, metric.name) for comparison in comparisons(sources)]
    passed = [row for row in sources.rows() if row.result is Result.PASS]
    if passed:
        found.append(f"{len(passed)} gates hold, on the machine and the samples named on this page.")
    return found


def _claim(comparison: Comparison, metric: str) -> str:
    interval = comparison.interval
    if comparison.kind == "retention":
        kept = f"{percent(1 - interval.value, 1)} {span(1 - interval.high, 1 - interval.low)}"
        return f"The student keeps {kept} of the {comparison.reference}'s {metric}."
    if comparison.kind == "int8":
        return f"INT8 loses {estimate_text(interval, relative=True)} of the student's {metric}."
    gain = f"{signed(-interval.value)} [{signed(-interval.high)}, {signed(-interval.low)}] {metric}"
    if comparison.kind == "trivial":
        beats = "beats" if interval.measured and interval.high < 0 else "is not shown to beat"
        return f"The student {beats} the best trivial prediction, {comparison.reference}: {gain}."
    return _on_distillation(comparison, f"{gain} against the same student trained on its labels alone")


def _on_distillation(comparison: Comparison, gain: str) -> str:
    interval = comparison.interval
    if interval.measured and interval.high < 0:
        return f"Distillation helps: {gain}."
    if interval.measured and interval.low > 0:
        return f"Distillation does harm here: {gain}."
    return f"Distillation is not shown to help: {gain}; the interval does not exclude zero."


def limits(sources: Sources) -> list[str]:
    """What the numbers cannot support."""
    return [*_about_samples(sources), *_about_labels(sources), *_about_scenes(sources), *_about_machine(sources),
            *_about_gates(sources), *sources.left_out]


def _about_samples(sources: Sources) -> Iterator[str]:
    models = judged(sources)
    if models:
        evaluation = require_evaluation(models[0])
        groups = len(np.unique(evaluation.groups))
        yield (
            f"Accuracy is from {count(len(evaluation))} test samples of {count(groups)} independent recordings. The "
            "intervals (95 %, paired bootstrap over recordings) say how much the choice of test scenes matters. They "
            "do not cover the luck of training: each network here was trained once, with one seed."
        )
        if any(m.look.startswith(BASELINE) for m in models):
            yield ("Read every number against the trivial predictions beside it: a low value may still be far above "
                   "them, and a high one not.")
    else:
        yield "Nothing is said about accuracy: no evaluation was given."


def _about_labels(sources: Sources) -> Iterator[str]:
    student = sources.model("student")
    if student is None or student.artifact is None:
        return
    labels = labels_of(student.artifact)
    fraction = labels.get("fraction")
    if fraction is None or float(fraction) >= 1:
        yield ("How many labels the student saw is not recorded in its artifact." if fraction is None else
               "Teacher and student both saw all training labels: nothing here speaks of learning from fewer.")
        return
    seen = f"{percent(float(fraction), 0)} of the training labels"
    if "samples" in labels and "of" in labels:
        seen += f" ({count(int(labels['samples']))} of {count(int(labels['of']))} samples)"
    yield (
        f"The student saw {seen}; the teacher saw 100 %. Through the teacher the student uses all of them indirectly: "
        "this shows what a teacher is worth where one exists, not that few labels are enough. Another choice of "
        "labelled scenes gives another gain."
    )


def _about_scenes(sources: Sources) -> Iterator[str]:
    if sources.data is not None and sources.data.artifact.manifest.stage == "data record":
        yield ("All scenes are simulated (highway-env) with simulated sensors and weather, training and test from the "
               "same generator. Nothing here is evidence about real roads, real sensors or other maps.")
    yield ("Frames are judged one by one, open loop: no controller drives on these outputs, and no fault of a sensor, "
           "a clock or a process is part of the accuracy numbers.")


def _about_machine(sources: Sources) -> Iterator[str]:
    if not sources.checks:
        yield "Nothing is said about latency or memory: no CHECK was given."
        return
    machines = {str(check.manifest.environment.get("processor", "an unknown processor")) for check in sources.checks}
    yield (f"Latency and memory were measured on {' and '.join(sorted(machines))}. They say nothing about a Jetson or "
           "any other machine: run the check there.")
    int8 = sources.model("int8")
    if int8 is not None and "cpu" in int8.name:
        yield ("INT8 accuracy was measured with the CPU dialect. The TensorRT dialect carries the same scales, but no "
               "TensorRT engine was executed for this page.")


def _about_gates(sources: Sources) -> Iterator[str]:
    unknown = [row.title for row in sources.rows() if row.result is Result.NOT_MEASURED]
    if unknown:
        shown = ", ".join(unknown[:4]) + (f" and {len(unknown) - 4} more" if len(unknown) > 4 else "")
        yield f"Not measured, so not shown to hold: {shown}."
