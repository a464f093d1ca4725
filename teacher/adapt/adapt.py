"""`teacher adapt`: train few parameters on top of a frozen teacher, for a new domain."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.command import command
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.data.trained_on import check_training_data
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import ConfigError
from fmdeploy.evaluate.evaluation import Predict
from fmdeploy.manifest import EVALUATED_ON, Kind
from fmdeploy.models import num_parameters
from fmdeploy.models.recompute import checkpoint_activations
from fmdeploy.models.saved import LoadedModel, load_model
from fmdeploy.teacher.adapt.config import AdaptConfig
from fmdeploy.teacher.adapt.effect import Effect, measure_effect
from fmdeploy.teacher.adapt.methods import Plan, apply_plan
from fmdeploy.teacher.adapt.store import AdapterRecipe, save_adapter
from fmdeploy.teacher.adapt.training import Adaptation
from fmdeploy.teacher.scores import write_curve, write_scores
from fmdeploy.teacher.view import TeacherView
from fmdeploy.training.batches import SupervisedBatches
from fmdeploy.training.config import Precision
from fmdeploy.training.device import first_decides, resolve_precision, together
from fmdeploy.training.log import parse_log
from fmdeploy.training.loop import Job, fit
from fmdeploy.training.mixture.options import mix, replay_inputs


@dataclass(frozen=True)
class Start:
    """What a run begins with."""

    teacher: Artifact
    data: Dataset
    source: Dataset | None
    """Of the old domain, to measure the fall on."""
    replay: tuple[Dataset, ...] = ()
    elsewhere: dict[str, str] = field(default_factory=dict)
    """Other datasets that the teacher was trained on, and whether they were compared with the held-out splits."""

    def inputs(self) -> dict[str, Artifact]:
        """Roles of the artifacts, for the manifest."""
        found = {"teacher": self.teacher, "data": self.data.artifact, **replay_inputs(self.replay)}
        return found | ({EVALUATED_ON: self.source.artifact} if self.source is not None else {})


@command(AdaptConfig)
def adapt(config: AdaptConfig) -> Artifact:
    """Adapt a frozen teacher to a new domain: train an ADAPTER of few parameters on the train split's labels.

    Raises:
        ArtifactError: an input is not what it should be, or something else is at `out`.
        ConfigError: the teacher has nothing that this method could train.
        DivergedError: the loss became NaN.
        LeakageError: an old domain, or what the teacher was trained on, holds what the adapter is judged on.
    """
    config = config.model_copy(update={"precision": resolve_precision(config.precision)})
    start = _start(config)
    return produce(
        config.out, Kind.ADAPTER, stage="teacher adapt", config=config, inputs=start.inputs(),
        build=lambda draft: _build(draft, config, start), resumable=True,
    )


def _start(config: AdaptConfig) -> Start:
    teacher, data = open_artifact(config.teacher, Kind.TEACHER), open_dataset(config.data)
    replay = tuple(open_dataset(path) for path in config.replay)
    source = open_dataset(config.source_data) if config.source_data else None
    elsewhere = first_decides(lambda: check_training_data(
        [teacher], data, config.teacher_data, replay=replay, judged=[source] if source is not None else []))
    return Start(teacher, data, source, replay, elsewhere)


@dataclass(frozen=True)
class Bench:
    """A teacher about to be adapted: with what the plan adds, and only that wanting a gradient."""

    loaded: LoadedModel
    recipe: AdapterRecipe
    names: list[str]
    """Of the parameters that are trained."""
    batches: SupervisedBatches


def _bench(config: AdaptConfig, start: Start) -> Bench:
    loaded = load_model(start.teacher)
    size, heads = num_parameters(loaded.module), _heads_are_of_use(config, loaded)
    torch.manual_seed(config.seed)
    plan = Plan(method=config.method, options=config.options(), also=config.also)
    checkpoint_activations(loaded.module, config.activation_checkpointing)
    names = apply_plan(loaded, plan)
    trained = sum(loaded.module.get_parameter(name).numel() for name in names)
    recipe = AdapterRecipe(task=loaded.recipe.task, plan=plan, trained=trained, parameters=size, heads=heads)
    return Bench(loaded, recipe, names, _batches(config, start, loaded))


def _build(draft: Draft, config: AdaptConfig, start: Start) -> None:
    with together():
        bench = _bench(config, start)
        job = Job("adapter", Adaptation(bench.loaded.task, bench.loaded.module), bench.batches,
                  losses=lambda model, batch: model(batch), folder=draft.path("work/adapter"),
                  log=draft.path("log.jsonl"))
        timing = fit(job, config)
        if draft.is_main:
            draft.note(training=timing.as_note())
            write_curve(draft, parse_log(draft.path("log.jsonl")))
            _write(draft, config, start, bench)


def _write(draft: Draft, config: AdaptConfig, start: Start, bench: Bench) -> None:
    """What was trained, and its numbers."""
    loaded, recipe, batches = bench.loaded, bench.recipe, bench.batches
    save_adapter(draft, loaded.module, bench.names, recipe)
    predict = predict_with(loaded, config.precision)
    draft.write_json("metrics.json", {
        "method": config.method, "trained": recipe.trained, "params": recipe.parameters,
        "share": recipe.trained / recipe.parameters, "labels": batches.mixture.supervision(batches.index),
        **({"teacher_data": start.elsewhere} if start.elsewhere else {}),
        **write_scores(draft, predict, loaded.task, start.data),
        **_effects(draft, config, start, predict),
    })


def predict_with(loaded: LoadedModel, precision: Precision) -> Predict:
    """A network's logits as `evaluate` wants them."""
    return TeacherView(loaded.module, loaded.task.io, (), precision).logits


def _heads_are_of_use(config: AdaptConfig, loaded: LoadedModel) -> bool:
    """Whether the adapted outputs mean anything.

    Raises:
        ConfigError: the teacher was only pre-trained, and its heads are not adapted either.
    """
    if not loaded.recipe.heads and "head" not in (config.method, *config.also):
        raise ConfigError("was pre-trained only: its outputs mean nothing yet", where=config.teacher,
                          fix="Train its heads too, with --also head; or fine-tune it: teacher train --init")
    return True


def _batches(config: AdaptConfig, start: Start, loaded: LoadedModel) -> SupervisedBatches:
    mixture = mix(config, loaded.task, start.data, start.replay, config.seed)
    return SupervisedBatches(loaded.task, mixture, config, mixture.labelled(config.labels, config.label_seed))


def _effects(draft: Draft, config: AdaptConfig, start: Start, predict: Predict) -> dict[str, Any]:
    """What the adapter changes on the new domain, and on the old one where that is given.

    With the adapter off the old domain does not change at all: the teacher is frozen.
    """
    base = load_model(start.teacher)
    before = predict_with(base, config.precision)
    found: dict[str, Effect] = {}
    if base.recipe.heads:
        found["target"] = measure_effect(before, predict, base.task, start.data)
        if start.source is not None:
            found["source"] = measure_effect(before, predict, base.task, start.source)
            found["source"].after.save(draft, "source_evaluation")
            found["source"].before.save(draft, "source_evaluation_before")
    return {f"{name}_{key}": value for name, effect in found.items() for key, value in effect.as_metrics().items()}
