"""`distill`: train the student from labels, the teachers' outputs and the teachers' features."""

from __future__ import annotations

from typing import Any

from fmdeploy.artifact import Artifact
from fmdeploy.command import command
from fmdeploy.distill.assemble import assemble
from fmdeploy.distill.config import DistillConfig
from fmdeploy.distill.fidelity import measure
from fmdeploy.distill.scores import student_metrics
from fmdeploy.distill.sources import Sources, sources_of
from fmdeploy.draft import Draft, produce
from fmdeploy.manifest import Kind
from fmdeploy.models.saved import save_model
from fmdeploy.teacher.scores import write_curve
from fmdeploy.training.device import resolve_precision, together
from fmdeploy.training.log import parse_log
from fmdeploy.training.loop import fit


@command(DistillConfig)
def distill(config: DistillConfig) -> Artifact:
    """Train the student: on labels, on the teachers' outputs and on their maps. docs/distillation.md lists the losses.

    Raises:
        ArtifactError: an input is not what it should be, or the cache belongs to something else.
        ConfigError: unknown task, student, loss or layer; a teacher of another task or without the outputs asked for.
        LeakageError: a teacher was trained on what the student is judged on.
        DivergedError: the loss became NaN.
    """
    config = config.model_copy(update={"precision": resolve_precision(config.precision)})
    sources = sources_of(config)
    return produce(
        config.out, Kind.STUDENT, stage="distill", config=config, inputs=sources.inputs(),
        build=lambda draft: _build(draft, config, sources), resumable=True,
    )


def _build(draft: Draft, config: DistillConfig, sources: Sources) -> None:
    with together():
        made = assemble(config, sources, folder=draft.path("work/student"), log=draft.path("log.jsonl"))
        wanted = draft.is_main and sources.teachers and made.batches.augmentation.alone()
        fidelity = measure(config, sources, made) if wanted else {}
        timing = fit(made.job, config)
        made.release()
        if draft.is_main:
            draft.note(training=timing.as_note())
            name, options = _recipe(config, sources)
            save_model(draft, made.student, task=config.task, role="student", name=name, options=options,
                       heads=made.trains_heads)
            write_curve(draft, parse_log(draft.path("log.jsonl")))
            metrics = student_metrics(draft, config, sources, made)
            draft.write_json("metrics.json", metrics | ({"augmentation": fidelity} if fidelity else {}))


def _recipe(config: DistillConfig, sources: Sources) -> tuple[str, dict[str, Any]]:
    """Name and options that build the student again."""
    if sources.start is not None:
        return sources.start.recipe.name, dict(sources.start.recipe.options)
    return config.student, config.sizes()
