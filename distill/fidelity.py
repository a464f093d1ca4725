"""How far cached answers that were moved are from what the teacher says about moved inputs.

A cache holds the teacher's answers for the canonical view. An augmentation moves them as if the teacher were
equivariant, which it is not quite: position embeddings, borders and interpolation differ. This measures by how much.

Legend: B samples.
"""

from __future__ import annotations

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.distill.assemble import Assembly, live_views
from fmdeploy.distill.augment import Augmentation
from fmdeploy.distill.config import DistillConfig
from fmdeploy.distill.sources import Sources
from fmdeploy.progress import say
from fmdeploy.teacher.view import TeacherView
from fmdeploy.training.device import default_device

SAMPLES = 32
DIGITS = 4  # of the numbers in the metrics: the last bits depend on the number of threads

Report = dict[str, dict[str, dict[str, float]]]


def measure(config: DistillConfig, sources: Sources, made: Assembly) -> dict[str, Report]:
    """Compare on 32 evenly spaced training samples, for each transform alone; say it, and return it.

    Returns:
        Teacher (`teacher0`, ...) → transform (`none` first: what the cache's encoding costs) → answer → `cosine` and
        `relative_error`.
    """
    views = made.objective.live or live_views(config, sources, [match.layer for match in made.objective.matches])
    samples = made.batches.samples
    index = np.unique(np.linspace(0, len(samples) - 1, min(SAMPLES, len(samples))).round().astype(np.int64))
    inputs, _ = samples.batch(index)
    found = {}
    for number, view in enumerate(views):
        stored = made.batches.caches[number].batch(index) if made.batches.caches else _answers(view, inputs)
        found[f"teacher{number}"] = _of_one(config, sources, made.batches.augmentation, view, stored, inputs)
        for transform, answers in found[f"teacher{number}"].items():
            numbers = ", ".join(f"{name} cosine {row['cosine']:.4f} error {row['relative_error']:.3f}"
                                for name, row in answers.items())
            say(f"teacher{number} against its moved answers, {transform}: {numbers}")
    return found


def _of_one(
    config: DistillConfig, sources: Sources, augmentation: Augmentation, view: TeacherView, stored: Arrays,
    inputs: Arrays,
) -> Report:
    cases = {"none": Augmentation(flip=False), **augmentation.alone()}
    report: Report = {}
    for name, case in cases.items():
        geometry = case.draw(len(next(iter(inputs.values()))), seed=config.seed, step=0)
        if name == "flip":
            geometry.flip[:] = True
        moved = sources.task.transform(dict(stored), geometry)
        live = _answers(view, sources.task.transform(dict(inputs), geometry))
        report[name] = {key: _difference(moved[key], live[key]) for key in live if key in moved}
    return report


def _answers(view: TeacherView, inputs: Arrays) -> Arrays:
    return view.arrays(inputs, default_device())


def _difference(found: Array, wanted: Array) -> dict[str, float]:
    """Cosine, and size of the difference over the size of `wanted`, of all elements together."""
    ours, theirs = found.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
    size = float(np.linalg.norm(theirs)) or 1.0
    cosine = float(ours @ theirs) / ((float(np.linalg.norm(ours)) or 1.0) * size)
    error = float(np.linalg.norm(ours - theirs)) / size
    return {"cosine": round(cosine, DIGITS), "relative_error": round(error, DIGITS)}
