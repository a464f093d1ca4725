"""Supervised training: the task's loss sees numbers of full precision; labels are rationed only where they are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fmdeploy.errors import ConfigError
from fmdeploy.models import input_list, named_outputs
from fmdeploy.task import load_task
from fmdeploy.teacher.objectives.supervised import Supervised
from fmdeploy.teacher.train import train
from support.training_data import TEACHER

TASK = load_task("bev-occupancy")


def test_the_loss_is_computed_in_full_precision_under_autocast() -> None:
    torch.manual_seed(0)
    teacher = TASK.teacher({name: TEACHER[name] for name in ("dim", "depth", "heads", "stem_width", "width")}).eval()
    inputs = {spec.name: torch.rand(2, *spec.shape).round() for spec in TASK.io.inputs}
    targets = {"bev": torch.randint(0, 2, (2, 5, 64, 64)), "scene": torch.tensor([1, 4])}
    objective = Supervised(TASK, teacher, Supervised.Config(), steps=1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective.losses(teacher, {"inputs": inputs, "targets": targets})["hard"]
        outputs = named_outputs(TASK.io, teacher(*input_list(TASK.io, inputs)))
    assert outputs["bev"].dtype == torch.bfloat16
    whole = TASK.loss({name: value.float() for name, value in outputs.items()}, targets)
    assert loss.item() == whole.item()


def test_a_share_of_the_labels_is_refused_where_none_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no objective of this run reads labels"):
        train(data=tmp_path, out=tmp_path / "t", objective=("mae",), labels=0.5)


def test_sharding_is_refused_by_an_objective_that_moves_weights_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the objective worldmodel needs its whole network"):
        train(data=tmp_path, out=tmp_path / "t", objective=("mae", "worldmodel"), sharding="fsdp")
