"""`teacher train`: train a teacher by one objective or several, from scratch or from another teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import nn

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.command import command
from fmdeploy.config import InputPath, OutputPath
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.data.trained_on import TrainedOnConfig, check_training_data
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import ConfigError
from fmdeploy.manifest import Kind
from fmdeploy.models import num_parameters
from fmdeploy.models.recompute import checkpoint_activations
from fmdeploy.models.saved import LoadedModel, load_model, save_model
from fmdeploy.provenance import source_digest
from fmdeploy.task import Task, load_task
from fmdeploy.teacher.objectives.collapse import naming_checkpoint
from fmdeploy.teacher.objectives.pretraining import Pretraining, make_batches
from fmdeploy.teacher.objectives.registry import choose, refuse_sharding
from fmdeploy.teacher.objectives.store import save_objectives, say_replaced
from fmdeploy.teacher.probe.curve import ProbeCurve
from fmdeploy.teacher.scores import write_curve, write_scores
from fmdeploy.teacher.sizes import TeacherSizes
from fmdeploy.teacher.view import TeacherView
from fmdeploy.training.config import TrainingConfig
from fmdeploy.training.device import first_decides, resolve_precision, together
from fmdeploy.training.log import parse_log
from fmdeploy.training.loop import Batch, Job, fit
from fmdeploy.training.mixture.options import Mixture, MixtureConfig, mix, replay_inputs
from fmdeploy.training.sampler import Index


class TeacherConfig(TeacherSizes, TrainedOnConfig, MixtureConfig, TrainingConfig):
    """How the teacher is trained. Sizes that are not given are the task's own, or those of `init`."""

    data: InputPath = Field(description="DATASET")
    out: OutputPath = Field(description="Where the TEACHER is written")
    task: str = Field(default="bev-occupancy", description="built-in task, or module:Class")
    objective: tuple[str, ...] = Field(default=("supervised",), min_length=1, description=(
        "NAME or NAME=WEIGHT; repeat it to train several at once. docs/objectives.md lists them"))
    set: tuple[str, ...] = Field(default=(), description="an objective's option, as NAME.KEY=VALUE; may be repeated")
    init: InputPath | None = Field(default=None, description="TEACHER to start from, such as a pre-trained one")
    labels: float = Field(default=1.0, gt=0, le=1, description="share of the train simulations whose labels are used")
    label_seed: int = Field(default=0, ge=0, description="which simulations those are")
    probe_every: int = Field(default=0, ge=0, description="steps between cheap probes on val; 0: none")

    @model_validator(mode="after")
    def _agree(self) -> TeacherConfig:
        sizes = [name for name in self.sizes() if name != "activation_checkpointing"]
        if self.init is not None and sizes:
            raise ValueError(f"sizes are those of --init: leave out {', '.join(sizes)}")
        if self.probe_every and self.sharding != "none":
            raise ValueError("probe_every needs the whole network in each process: leave out sharding")
        return self

    def resolved(self) -> dict[str, Any]:
        """With a hash of the user's own task in place of trust in its name."""
        return {**super().resolved(), "task_source": source_digest(self.task)}


@dataclass(frozen=True)
class Start:
    """What a run begins with."""

    task: Task
    data: Dataset
    init: Artifact | None = None
    loaded: LoadedModel | None = None
    replay: tuple[Dataset, ...] = ()
    elsewhere: dict[str, str] = field(default_factory=dict)
    """Other datasets that `init` was trained on, and whether they were compared with the held-out splits."""

    def inputs(self) -> dict[str, Artifact]:
        """Roles of the artifacts, for the manifest."""
        given = {"data": self.data.artifact, "init": self.init}
        return {role: a for role, a in given.items() if a is not None} | replay_inputs(self.replay)

    def module(self, config: TeacherConfig) -> tuple[nn.Module, dict[str, Any]]:
        """A fresh teacher, or the one to start from; and the options that build it again."""
        if self.loaded is not None:
            checkpoint_activations(self.loaded.module, config.activation_checkpointing)
            return self.loaded.module, dict(self.loaded.recipe.options)
        torch.manual_seed(config.seed)
        return self.task.teacher(config.sizes()), config.sizes()


@command(TeacherConfig)
def train(config: TeacherConfig) -> Artifact:
    """Train the teacher on the train split: on its labels, or by an objective that needs none.

    Raises:
        ArtifactError: `data` is not a DATASET, or something else is at `out`.
        ConfigError: unknown task or objective, sizes that do not fit together, a batch that cannot be cut.
        DivergedError: the loss became NaN.
        CollapsedError: the representation lost its variety.
        LeakageError: an old domain, or what `init` was trained on, holds what this teacher is judged on.
    """
    config = config.model_copy(update={"precision": resolve_precision(config.precision)})
    start = _start(config)
    return produce(
        config.out, Kind.TEACHER, stage="teacher train", config=config, inputs=start.inputs(),
        build=lambda draft: _build(draft, config, start), resumable=True,
    )


def _start(config: TeacherConfig) -> Start:
    choices = choose(config.objective, config.set)  # a typing error is told before anything is opened
    if config.labels < 1 and not any(choice.kind.needs_labels for choice in choices):
        raise ConfigError("no objective of this run reads labels, so samples without them are as good", where="labels",
                          found=config.labels, fix="Leave --labels out")
    if config.sharding != "none":
        refuse_sharding(choices)
    task, data = load_task(config.task), open_dataset(config.data)
    replay = tuple(open_dataset(path) for path in config.replay)
    init = open_artifact(config.init, Kind.TEACHER) if config.init is not None else None
    loaded = load_model(init) if init is not None else None
    if loaded is not None and loaded.recipe.task != config.task:
        raise ConfigError("the teacher to start from was made for another task", where=config.init,
                          expected=config.task, found=loaded.recipe.task)
    elsewhere = first_decides(lambda: check_training_data(
        [init] if init is not None else [], data, config.teacher_data, replay=replay))
    return Start(task, data, init, loaded, replay, elsewhere)


@dataclass(frozen=True)
class Bench:
    """A teacher about to be trained: its network and what builds that again, its objectives and its batches."""

    module: nn.Module
    options: dict[str, Any]
    whole: Pretraining
    batches: Callable[[int, int], Batch]
    mixture: Mixture
    index: Index | None
    """Numbers of the samples whose labels are used; None: all."""


def _bench(config: TeacherConfig, start: Start) -> Bench:
    module, options = start.module(config)
    torch.manual_seed(config.seed)
    whole = Pretraining(start.task, module, choose(config.objective, config.set), steps=config.steps)
    mixture = mix(config, start.task, start.data, start.replay, config.seed, labels=whole.trains_heads)
    index = mixture.labelled(config.labels, config.label_seed)
    batches = make_batches(start.task, mixture, config, index, tuple(whole.each().values()))
    return Bench(module, options, whole, batches, mixture, index)


def _build(draft: Draft, config: TeacherConfig, start: Start) -> None:
    with together():
        bench = _bench(config, start)
        whole = bench.whole
        if start.init is not None and draft.is_main:
            say_replaced(start.init, whole.each())
        curve = ProbeCurve.of(start.task, start.data, bench.module, every=config.probe_every, steps=config.steps,
                              folder=draft.path("work/probes"))
        job = Job("teacher", whole, bench.batches, losses=lambda model, batch: model(batch),
                  after_step=curve.after(whole.after_step) if curve else whole.after_step, resting=whole.resting,
                  folder=draft.path("work/teacher"), log=draft.path("log.jsonl"))
        with naming_checkpoint(job.folder):
            timing = fit(job, config)
        whole.release()
        if draft.is_main:
            draft.note(training=timing.as_note())
            write_curve(draft, parse_log(draft.path("log.jsonl")))
            if curve:
                curve.write(draft)
            _write(draft, config, start, bench)


def _write(draft: Draft, config: TeacherConfig, start: Start, bench: Bench) -> None:
    """The network, what its objectives leave behind, and its numbers."""
    module, whole = bench.module, bench.whole
    heads = whole.trains_heads or (start.loaded is not None and start.loaded.recipe.heads)
    save_model(draft, module, task=config.task, role="teacher", name="", options=bench.options, heads=heads)
    save_objectives(draft, whole)
    draft.write_json("metrics.json", {
        "params": num_parameters(module), "objective": whole.weights,
        **({"teacher_data": start.elsewhere} if start.elsewhere else {}),
        **({"labels": _supervision(bench.mixture, bench.index)} if whole.trains_heads else {}),
        **(write_scores(draft, _logits(module, start.task, config), start.task, start.data) if heads else {}),
    })


def _logits(module: nn.Module, task: Task, config: TeacherConfig) -> Any:
    return TeacherView(module, task.io, (), config.precision).logits


def _supervision(mixture: Mixture, index: Index | None) -> dict[str, Any]:
    found = mixture.supervision(index)
    return {"fraction": round(found["samples"] / found["of"], 6), **found}
