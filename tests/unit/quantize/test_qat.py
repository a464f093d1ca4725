"""Quantisation-aware training brings the INT8 student closer to the float one, and resumes to the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fmdeploy.data.format import open_dataset
from fmdeploy.errors import ConfigError
from fmdeploy.evaluate.sqnr import sqnr_db
from fmdeploy.models import predictor
from fmdeploy.quantize.calibrate import draw
from fmdeploy.quantize.ptq import QuantisedStudent, ptq
from fmdeploy.quantize.qat import qat
from fmdeploy.task import load_task
from fmdeploy.training.config import TrainingConfig
from support.training_data import write_scenes

TASK = load_task("bev-occupancy")
CONFIG = TrainingConfig.model_validate(
    {"steps": 30, "batch": 4, "lr": 1e-3, "precision": "fp32", "checkpoint_every": 10, "weight_decay": 0.0}
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("qat")
    write_scenes(out / "data", sequences=16)
    return out


def _student() -> nn.Module:
    torch.manual_seed(0)
    return TASK.student("cnn", {"stem_width": 8, "width": 8}).eval()


def _start(folder: Path) -> tuple[nn.Module, QuantisedStudent]:
    student = _student()
    data = open_dataset(folder / "data")
    return student, ptq(student, TASK.io, draw(TASK, data, count=4, seed=0))


def _train(folder: Path, work: Path, config: TrainingConfig = CONFIG, **weights: Any) -> tuple[nn.Module, QuantisedStudent]:
    student, quantised = _start(folder)
    work.mkdir(exist_ok=True)
    qat(quantised, student, TASK, open_dataset(folder / "data"), config, folder=work / "check", log=work / "log.jsonl",
        **{"alpha_student": 1.0, "alpha_labels": 0.0} | weights)
    return student, quantised


def _distance_db(folder: Path, student: nn.Module, quantised: QuantisedStudent) -> float:
    inputs, _ = TASK.samples(open_dataset(folder / "data"), "test").batch(np.arange(3))
    wanted, found = (predictor(module, TASK.io)(inputs)["bev"] for module in (student, quantised.module))
    return sqnr_db(wanted, found)


def test_imitating_the_float_student_brings_the_int8_one_closer(folder: Path, tmp_path: Path) -> None:
    """From a student with noise on its weights, as a coarse grid would put it."""
    student, quantised = _start(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in quantised.module.parameters():
            parameter.add_(0.05 * parameter.abs().mean() * torch.randn_like(parameter))
    before = _distance_db(folder, student, quantised)
    qat(quantised, student, TASK, open_dataset(folder / "data"), CONFIG, alpha_student=1.0, alpha_labels=0.0,
        folder=tmp_path / "check", log=tmp_path / "log.jsonl")
    after = _distance_db(folder, student, quantised)
    assert after > before + 1, f"{before:.1f} dB -> {after:.1f} dB"


def test_ranges_stay_frozen(folder: Path, tmp_path: Path) -> None:
    from fmdeploy.quantize import modelopt

    before = modelopt.ranges(_start(folder)[1].module)
    after = modelopt.ranges(_train(folder, tmp_path)[1].module)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_labels_train_too(folder: Path, tmp_path: Path) -> None:
    soft = _train(folder, tmp_path / "a")[1].module.state_dict()
    hard = _train(folder, tmp_path / "b", alpha_student=0.0, alpha_labels=1.0)[1].module.state_dict()
    assert not torch.equal(soft["head.weight" if "head.weight" in soft else "head.0.weight"],
                           hard["head.weight" if "head.weight" in hard else "head.0.weight"])


def test_interrupted_training_goes_on_to_the_same_weights(folder: Path, tmp_path: Path) -> None:
    whole = _train(folder, tmp_path / "whole")[1].module.state_dict()
    work = tmp_path / "cut"
    work.mkdir()

    class StopError(RuntimeError):
        pass

    student, quantised = _start(folder)
    seen = 0

    def stop(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen == 18:
            raise StopError

    quantised.module.register_forward_pre_hook(stop)
    with pytest.raises(StopError):
        qat(quantised, student, TASK, open_dataset(folder / "data"), CONFIG, alpha_student=1.0, alpha_labels=0.0,
            folder=work / "check", log=work / "log.jsonl")
    resumed = _train(folder, work)[1].module.state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_loss_and_a_traceable_student_are_needed(folder: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    with pytest.raises(ConfigError, match="QAT needs a loss"):
        _train(folder, tmp_path, alpha_student=0.0)
    student, quantised = _start(folder)
    untraced = replace(quantised, placement=replace(quantised.placement, method="modules", reason="net.py:3 `if x:`"))
    with pytest.raises(ConfigError, match=r"net\.py:3 `if x:`: QAT needs a student that torch.fx can trace"):
        qat(untraced, student, TASK, open_dataset(folder / "data"), CONFIG, alpha_student=1.0, alpha_labels=0.0,
            folder=tmp_path, log=tmp_path / "log.jsonl")
