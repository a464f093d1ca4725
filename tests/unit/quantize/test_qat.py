"""Training on the grid brings the INT8 student closer to its target, and resumes to the same weights and ranges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fmdeploy.artifact import open_artifact
from fmdeploy.data.format import open_dataset
from fmdeploy.distill.distill import distill
from fmdeploy.errors import ConfigError, LeakageError
from fmdeploy.evaluate.sqnr import sqnr_db
from fmdeploy.models import predictor
from fmdeploy.models.saved import load_model
from fmdeploy.quantize import modelopt
from fmdeploy.quantize.calibrate import draw
from fmdeploy.quantize.grid import fp16_amax
from fmdeploy.quantize.ptq import QuantisedStudent, ptq
from fmdeploy.quantize.qad import school
from fmdeploy.quantize.qat import Lesson, imitation, qat, validation
from fmdeploy.quantize.quantize import quantize
from fmdeploy.task import load_task
from fmdeploy.teacher.cache import cache
from fmdeploy.teacher.train import train
from fmdeploy.training.config import TrainingConfig
from fmdeploy.training.loop import Timing
from support.training_data import STUDENT, TEACHER, write_scenes

TASK = load_task("bev-occupancy")
CONFIG = TrainingConfig.model_validate(
    {"steps": 30, "batch": 4, "lr": 1e-3, "precision": "fp32", "checkpoint_every": 10, "weight_decay": 0.0}
)
SOFT = {"alpha_student": 1.0, "alpha_labels": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("qat")
    write_scenes(out / "data", sequences=16)
    return out


@pytest.fixture(scope="module")
def taught(folder: Path) -> Path:
    """With a `teacher`, its `features`, and a `student` distilled from them."""
    train(data=folder / "data", out=folder / "teacher", steps=24, **TEACHER)
    given = {"data": folder / "data", "teacher": folder / "teacher"}
    cache(**given, out=folder / "features", precision="fp32")
    distill(**given, features=folder / "features", out=folder / "student", labels=0.5, **STUDENT)
    return folder


def _start(folder: Path, *, noise: float = 0.0) -> tuple[nn.Module, QuantisedStudent]:
    """A student and its quantised form, with noise on its weights as a coarse grid would put it."""
    torch.manual_seed(0)
    student = TASK.student("cnn", {"stem_width": 8, "width": 8}).eval()
    quantised = ptq(student, TASK.io, draw(TASK, open_dataset(folder / "data"), count=4, seed=0))
    _disturb(quantised.module, noise)
    return student, quantised


def _disturb(module: nn.Module, noise: float) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(noise * parameter.abs().mean() * torch.randn_like(parameter))


def _lesson(folder: Path, student: nn.Module, **weights: float) -> Lesson:
    return imitation(student, TASK, open_dataset(folder / "data"), CONFIG, **(SOFT | weights))


def _train(folder: Path, work: Path, noise: float = 0.0, **options: Any) -> tuple[QuantisedStudent, Timing]:
    student, quantised = _start(folder, noise=noise)
    work.mkdir(exist_ok=True)
    return qat(quantised, options.pop("lesson", None) or _lesson(folder, student), CONFIG, folder=work / "check",
               log=work / "log.jsonl", **options)


def _distance_db(folder: Path, wanted: nn.Module, found: nn.Module) -> float:
    inputs, _ = TASK.samples(open_dataset(folder / "data"), "test").batch(np.arange(3))
    return sqnr_db(predictor(wanted, TASK.io)(inputs)["bev"], predictor(found, TASK.io)(inputs)["bev"])


def _divergence(folder: Path, teacher: nn.Module, found: nn.Module) -> float:
    """The distillation loss on the test split."""
    inputs, _ = TASK.samples(open_dataset(folder / "data"), "test").batch(np.arange(6))
    outputs = [{name: torch.from_numpy(value) for name, value in predictor(module, TASK.io)(inputs).items()}
               for module in (found, teacher)]
    return float(TASK.distillation_loss(*outputs))


@pytest.mark.parametrize("learn", [False, True])
def test_imitating_the_float_student_brings_the_int8_one_closer(folder: Path, tmp_path: Path, learn: bool) -> None:
    student, quantised = _start(folder, noise=0.05)
    before = _distance_db(folder, student, quantised.module)
    trained, _ = _train(folder, tmp_path, noise=0.05, learn_scales=learn)
    after = _distance_db(folder, student, trained.module)
    assert after > before + 1, f"{before:.1f} dB -> {after:.1f} dB"


def test_frozen_ranges_stay_and_learned_ones_move_on_the_grid(folder: Path, tmp_path: Path) -> None:
    before = modelopt.ranges(_start(folder)[1].module)
    frozen, _ = _train(folder, tmp_path / "a")
    assert all(torch.equal(before[name], found) for name, found in modelopt.ranges(frozen.module).items())
    learned, _ = _train(folder, tmp_path / "b", learn_scales=True)
    after = modelopt.ranges(learned.module)
    moved = [name for name, found in after.items() if not torch.equal(before[name], found)]
    assert len(moved) > len(after) / 2
    assert all(torch.equal(fp16_amax(found), found) for found in after.values())
    rows = learned.calibration.ranges
    assert {row.method for row in rows.values()} == {"learned"}
    assert all(rows[row.quantizer].amax == float(after[f"quantizers.{row.quantizer}.input_quantizer"])
               for row in learned.placement.activations)


def test_labels_train_too(folder: Path, tmp_path: Path) -> None:
    soft, _ = _train(folder, tmp_path / "a")
    student, _ = _start(folder)
    hard, _ = _train(folder, tmp_path / "b", lesson=_lesson(folder, student, alpha_student=0.0, alpha_labels=1.0))
    assert not torch.equal(soft.module.state_dict()["head.weight"], hard.module.state_dict()["head.weight"])


def test_interrupted_training_goes_on_to_the_same_weights_and_ranges(folder: Path, tmp_path: Path) -> None:
    judged = validation(TASK, open_dataset(folder / "data"), every=6, patience=0, count=6)
    whole, timing = _train(folder, tmp_path / "whole", learn_scales=True, judged=judged)

    class StopError(RuntimeError):
        pass

    student, _ = _start(folder)
    lesson, seen = _lesson(folder, student), 0

    def stop(step: int, part: int) -> Any:
        nonlocal seen
        seen += 1
        if seen == 18:
            raise StopError
        return lesson.batch(step, part)

    work = tmp_path / "cut"
    with pytest.raises(StopError):
        _train(folder, work, learn_scales=True, judged=judged, lesson=replace(lesson, batch=stop))
    resumed, again = _train(folder, work, learn_scales=True, judged=judged)
    assert 0 < again.steps < timing.steps
    assert again.judged == timing.judged
    wanted = whole.module.state_dict()
    assert all(torch.equal(wanted[name], found) for name, found in resumed.module.state_dict().items())
    assert resumed.calibration == whole.calibration


def test_qad_brings_the_int8_student_closer_to_the_teacher(taught: Path, tmp_path: Path) -> None:
    """From the student that it was distilled to."""
    artifact, data = open_artifact(taught / "student"), open_dataset(taught / "data")
    student, teacher = load_model(artifact).module, load_model(open_artifact(taught / "teacher")).module
    quantised = ptq(student, TASK.io, draw(TASK, data, count=4, seed=0))
    before = _divergence(taught, teacher, quantised.module)
    lesson = school(artifact, CONFIG, data=taught / "data", teacher=taught / "teacher",
                    features=taught / "features", task="bev-occupancy").lesson(quantised)
    trained, _ = qat(quantised, lesson, CONFIG, folder=tmp_path / "check", log=tmp_path / "log.jsonl")
    after = _divergence(taught, teacher, trained.module)
    assert after < 0.95 * before, f"{before:.4f} -> {after:.4f}"


def test_qad_sees_the_labels_that_the_student_saw(taught: Path) -> None:
    artifact = open_artifact(taught / "student")
    quantised = ptq(load_model(artifact).module, TASK.io, draw(TASK, open_dataset(taught / "data"), count=4, seed=0))
    lesson = school(artifact, CONFIG, data=taught / "data", teacher=taught / "teacher",
                    features=taught / "features", task="bev-occupancy").lesson(quantised)
    batches: Any = lesson.batch
    assert len(batches.labelled) == 18 == len(batches.samples) / 2
    assert batches.config.loss == ("labels=0.5", "logits=2")


def test_a_qad_teacher_of_other_data_is_compared_with_what_is_held_out(
    taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scenes(tmp_path / "same", sequences=32)  # the first 16 are those of `data`, all of them for training
    write_scenes(tmp_path / "other", seed=9)
    given: dict[str, Any] = {"student": taught / "student", "data": taught / "data", "mode": "qad", "steps": 1,
                             "batch": 4, "calibration_samples": 4}
    for name in ("same", "other"):
        train(data=tmp_path / name, out=tmp_path / f"{name}-teacher", steps=1, **TEACHER)
    with pytest.raises(LeakageError, match="was trained on 4 of the sequences that the run is judged on"):
        quantize(out=tmp_path / "q", teacher=tmp_path / "same-teacher", teacher_data=tmp_path / "same", **given)
    assert "show it with --teacher-data" not in capsys.readouterr().err
    school(open_artifact(taught / "student"), CONFIG, data=taught / "data", teacher=tmp_path / "other-teacher",
           features=None, task="bev-occupancy")
    assert "show it with --teacher-data" in capsys.readouterr().err  # an option that quantize has
    made = quantize(out=tmp_path / "q", teacher=tmp_path / "other-teacher", teacher_data=tmp_path / "other", **given)
    digest = open_artifact(tmp_path / "other").digest
    assert made.json("metrics.json")["teacher_data"] == {digest: "disjoint"}
    assert set(made.inputs) == {"student", "data", "teacher"}
    with pytest.raises(ConfigError, match="a teacher is for --mode qad"):
        quantize(out=tmp_path / "p", **{**given, "mode": "ptq"}, teacher_data=tmp_path / "other")


def test_a_loss_and_a_traceable_student_are_needed(folder: Path, tmp_path: Path) -> None:
    student, quantised = _start(folder)
    with pytest.raises(ConfigError, match="QAT needs a loss"):
        _lesson(folder, student, alpha_student=0.0)
    untraced = replace(quantised, placement=replace(quantised.placement, method="modules", reason="net.py:3 `if x:`"))
    with pytest.raises(ConfigError, match=r"net\.py:3 `if x:`: training on the grid needs a student"):
        qat(untraced, _lesson(folder, student), CONFIG, folder=tmp_path, log=tmp_path / "log.jsonl")
