"""`teacher train`: supervised multi-task training of the teacher."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from fmdeploy.artifact import Artifact
from fmdeploy.command import command
from fmdeploy.config import InputPath, OutputPath
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.draft import Draft, produce
from fmdeploy.manifest import Kind
from fmdeploy.models import input_list, named_outputs, num_parameters
from fmdeploy.models.saved import save_model
from fmdeploy.provenance import source_digest
from fmdeploy.task import Task, load_task
from fmdeploy.teacher.scores import write_curve, write_scores
from fmdeploy.teacher.view import TeacherView
from fmdeploy.training.batches import SupervisedBatches
from fmdeploy.training.config import TrainingConfig
from fmdeploy.training.device import resolve_precision, together
from fmdeploy.training.log import parse_log
from fmdeploy.training.loop import Job, Tensors, fit

SIZES = ("dim", "depth", "heads", "stem_width", "width", "activation_checkpointing")


class TeacherConfig(TrainingConfig):
    """How the teacher is trained. Sizes that are not given are the task's own."""

    data: InputPath = Field(description="DATASET")
    out: OutputPath = Field(description="Where the TEACHER is written")
    task: str = Field(default="bev-occupancy", description="built-in task, or module:Class")
    dim: int | None = Field(default=None, ge=1, description="width of the transformer")
    depth: int | None = Field(default=None, ge=1, description="blocks of the transformer")
    heads: int | None = Field(default=None, ge=1, description="attention heads")
    stem_width: int | None = Field(default=None, ge=1, description="channels at half resolution")
    width: int | None = Field(default=None, ge=1, description="channels at quarter resolution")
    activation_checkpointing: bool | None = Field(default=None, description="recompute activations to save memory")

    def resolved(self) -> dict[str, Any]:
        """With a hash of the user's own task in place of trust in its name."""
        return {**super().resolved(), "task_source": source_digest(self.task)}

    def sizes(self) -> dict[str, Any]:
        """The size options that were given, for `Task.teacher`."""
        given = {name: getattr(self, name) for name in SIZES}
        return {name: value for name, value in given.items() if value is not None}


@command(TeacherConfig)
def train(config: TeacherConfig) -> Artifact:
    """Train the teacher on the labels of the train split.

    Raises:
        ArtifactError: `data` is not a DATASET, or something else is at `out`.
        ConfigError: unknown task, sizes that do not fit together, a batch that cannot be cut.
        DivergedError: the loss became NaN.
    """
    config = config.model_copy(update={"precision": resolve_precision(config.precision)})
    data = open_dataset(config.data)
    return produce(
        config.out, Kind.TEACHER, stage="teacher train", config=config, inputs={"data": data.artifact},
        build=lambda draft: _build(draft, config, data), resumable=True,
    )


def _build(draft: Draft, config: TeacherConfig, data: Dataset) -> None:
    with together():
        task = load_task(config.task)
        torch.manual_seed(config.seed)
        module = task.teacher(config.sizes())
        job = Job("teacher", module, SupervisedBatches(task, task.samples(data, "train"), config),
                  losses=lambda model, batch: label_loss(task, model, batch),
                  folder=draft.path("work/teacher"), log=draft.path("log.jsonl"))
        timing = fit(job, config)
        if draft.is_main:
            draft.note(training=timing.as_note())
            save_model(draft, module, task=config.task, role="teacher", name="", options=config.sizes())
            write_curve(draft, parse_log(draft.path("log.jsonl")))
            view = TeacherView(module, task.io, (), config.precision)
            draft.write_json("metrics.json", {"params": num_parameters(module), "labels": _labels(task, data),
                                              **write_scores(draft, view.logits, task, data)})


def label_loss(task: Task, model: nn.Module, batch: Tensors) -> dict[str, Tensor]:
    """The task's loss against labels, as the only part."""
    outputs = named_outputs(task.io, model(*input_list(task.io, batch["inputs"])))
    return {"hard": task.loss(outputs, batch["targets"])}


def _labels(task: Task, data: Dataset) -> dict[str, float | int]:
    count = len(task.samples(data, "train"))
    return {"fraction": 1.0, "samples": count, "of": count}
