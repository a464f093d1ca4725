"""Supervised training: the task's loss sees numbers of full precision; labels are rationed only where they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fmdeploy.artifact import Artifact
from fmdeploy.config import load_config
from fmdeploy.data.format import open_dataset
from fmdeploy.errors import ConfigError
from fmdeploy.models import input_list, named_outputs
from fmdeploy.task import load_task
from fmdeploy.teacher.objectives.pretraining import Pretraining, make_batches
from fmdeploy.teacher.objectives.registry import choose
from fmdeploy.teacher.objectives.supervised import Supervised
from fmdeploy.teacher.train import TeacherConfig, train
from fmdeploy.training.batches import SupervisedBatches
from fmdeploy.training.mixture.options import mix
from support.training_data import TEACHER, write_scenes

TASK = load_task("bev-occupancy")
SIZES = {name: TEACHER[name] for name in ("dim", "depth", "heads", "stem_width", "width")}
BOTH: dict[str, Any] = {"objective": ("supervised", "mae"), "set": ("mae.width=16", "mae.heads=2")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 training samples of 6 simulations."""
    return write_scenes(tmp_path_factory.mktemp("supervised") / "data").root


def test_the_loss_is_computed_in_full_precision_under_autocast() -> None:
    torch.manual_seed(0)
    teacher = TASK.teacher(SIZES).eval()
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


def test_objectives_without_labels_see_every_sample_and_no_label(data: Path, tmp_path: Path) -> None:
    config = load_config(TeacherConfig, {"data": data, "out": tmp_path / "t", "labels": 0.2, **BOTH, **TEACHER})
    mixture = mix(config, TASK, open_dataset(data), (), config.seed)
    index = mixture.labelled(config.labels, config.label_seed)
    assert index is not None
    assert len(index) == 6
    whole = Pretraining(TASK, TASK.teacher(SIZES), choose(config.objective, config.set), steps=9)
    batches = make_batches(TASK, mixture, config, index, tuple(whole.each().values()))
    alone = SupervisedBatches(TASK, mixture, config, index)
    seen: list[Any] = []
    for step in range(9):  # one epoch
        batch = batches(step, 0)
        assert set(batch) == {"inputs", "mae", "labelled.inputs", "labelled.targets"}
        for kind, arrays in alone(step, 0).items():
            assert all(np.array_equal(batch[f"labelled.{kind}"][name], array) for name, array in arrays.items())
        seen += [bytes(sample) for sample in batch["inputs"]["lidar"]]
    every, _ = mixture.samples.batch(np.arange(36))
    upright = {bytes(sample) for sample in every["lidar"]}
    mirrored = {bytes(np.ascontiguousarray(sample)) for sample in TASK.flip(every, np.ones(36, bool))["lidar"]}
    assert len(set(seen)) == 36
    assert set(seen) <= upright | mirrored


def test_the_supervised_part_is_that_of_a_run_of_its_own(data: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": data, "steps": 2, "labels": 0.2, **TEACHER}
    both, alone = train(out=tmp_path / "both", **BOTH, **options), train(out=tmp_path / "alone", **options)
    assert _first(both)["supervised.hard"] == _first(alone)["hard"]
    assert both.json("metrics.json")["labels"] == alone.json("metrics.json")["labels"] == {
        "fraction": round(6 / 36, 6), "samples": 6, "of": 36}


def _first(teacher: Artifact) -> dict[str, float]:
    record: dict[str, float] = json.loads(teacher.path("log.jsonl").read_text().splitlines()[0])
    return record
