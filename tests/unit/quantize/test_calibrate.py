"""Calibration: independent of order and batch, and refused where it cannot mean anything."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.data.from_arrays import write_arrays
from fmdeploy.errors import ArtifactError, DataError
from fmdeploy.evaluate.sqnr import sqnr_db
from fmdeploy.quantize import samples as module
from fmdeploy.quantize.build import build
from fmdeploy.quantize.calibrate import Calibration, CalibrationSet, calibrate, draw, input_statistics, redraw
from fmdeploy.quantize.grid import fp16_amax
from fmdeploy.quantize.ptq import ptq
from fmdeploy.quantize.samples import output_statistics
from fmdeploy.task import Arrays, load_task
from support.quantize_nets import Residual, bev_student, image_net, samples_of, zero_gamma

TASK = load_task("image-classification")


def _images(count: int = 12) -> Arrays:
    rng = np.random.default_rng(0)
    return {"image": rng.random((count, 3, 32, 32), np.float32), "label": rng.integers(0, 10, count)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out = tmp_path_factory.mktemp("calibration") / "data"
    write_arrays(out, _images(), {"train": np.arange(8), "val": np.arange(8, 10), "test": np.arange(10, 12)})
    return open_dataset(out)


def _ranges(calibration_set: CalibrationSet) -> Calibration:
    net, _ = image_net(Residual())
    quantised, placement = build(net, calibration_set, ["x0"])
    return calibrate(quantised, placement, calibration_set, ["x0"])


@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 1000))
def test_order_of_samples_changes_no_range(seed: int) -> None:
    _, io = image_net(Residual())
    plain = samples_of(io)
    order = np.random.default_rng(seed).permutation(len(plain))
    shuffled = replace(plain, ids=tuple(plain.ids[k] for k in order), inputs={"x0": plain.inputs["x0"][order]})
    assert _ranges(shuffled).ranges == _ranges(plain).ranges


def test_a_repeated_sample_changes_no_range() -> None:
    _, io = image_net(Residual())
    plain = samples_of(io)
    twice = replace(plain, ids=plain.ids + plain.ids, inputs={"x0": np.concatenate([plain.inputs["x0"]] * 2)})
    once, again = _ranges(plain).ranges, _ranges(twice).ranges
    assert {k: (r.low, r.high, r.amax) for k, r in again.items()} == {k: (r.low, r.high, r.amax) for k, r in once.items()}


def test_ranges_are_those_of_the_float_model() -> None:
    _, io = image_net(Residual())
    plain = samples_of(io)
    found = _ranges(plain).ranges["act_000"]
    x = plain.inputs["x0"]
    assert (found.low, found.high) == (float(x.min()), float(x.max()))
    assert found.amax == float(fp16_amax(torch.tensor(np.abs(x).max())))


def test_binary_inputs_get_the_smallest_range_that_holds_one() -> None:
    net, io = bev_student()
    rng = np.random.default_rng(0)
    inputs = {s.name: (rng.random((3, *s.shape)) < 0.1).astype(np.float32) for s in io.inputs}
    calibration_set = CalibrationSet(("a", "b", "c"), inputs, "", 0)
    quantised, placement = build(net, calibration_set, ["x0", "x1"])
    assert calibrate(quantised, placement, calibration_set, ["x0", "x1"]).ranges["act_000"].amax == 127 * float(np.nextafter(np.float16(1 / 127), np.float16(1)))


def test_samples_come_from_the_training_split_only(data: Dataset) -> None:
    chosen = draw(TASK, data, count=5, seed=3)
    assert len(chosen) == 5
    assert set(chosen.ids) <= set(TASK.samples(data, "train").ids)
    assert list(chosen.ids) == sorted(chosen.ids)
    for split in ("val", "test", "all"):
        with pytest.raises(DataError, match=r"must come from the training split.*expected train, found"):
            draw(TASK, data, count=5, seed=3, split=split)


def test_the_choice_is_a_function_of_the_seed(data: Dataset) -> None:
    assert draw(TASK, data, count=5, seed=3).digest == draw(TASK, data, count=5, seed=3).digest
    assert draw(TASK, data, count=5, seed=3).ids != draw(TASK, data, count=5, seed=4).ids
    assert len(draw(TASK, data, count=500, seed=3)) == 8


def test_digest_covers_values_and_names(data: Dataset) -> None:
    chosen = draw(TASK, data, count=5, seed=3)
    touched = chosen.inputs["image"].copy()
    touched[0, 0, 0, 0] += 1e-3
    assert replace(chosen, inputs={"image": touched}).digest != chosen.digest
    assert replace(chosen, ids=(*chosen.ids[:-1], "other")).digest != chosen.digest


def test_stored_samples_are_found_again_and_foreign_data_is_refused(data: Dataset, tmp_path: Path) -> None:
    chosen = draw(TASK, data, count=4, seed=1)
    stored = Calibration(chosen.data, chosen.digest, 1, chosen.ids, {})
    assert redraw(TASK, data, stored).digest == chosen.digest
    arrays = _images()
    arrays["image"] = arrays["image"] * np.float32(0.5)
    write_arrays(tmp_path / "other", arrays, {"train": np.arange(8), "test": np.arange(8, 12)})
    with pytest.raises(DataError, match="is not the dataset that the ranges were calibrated on"):
        redraw(TASK, open_dataset(tmp_path / "other"), stored)


def test_no_samples_are_refused(data: Dataset) -> None:
    with pytest.raises(DataError, match="no calibration samples"):
        draw(TASK, data, count=0, seed=0)
    with pytest.raises(DataError, match="no calibration samples"):
        module.check_inputs(CalibrationSet((), {"x0": np.zeros((0, 3), np.float32)}, "", 0))


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_constant_samples_are_refused(value: float) -> None:
    constant = CalibrationSet(("a", "b"), {"x0": np.full((2, 3, 16, 16), value, np.float32)}, "", 0)
    with pytest.raises(DataError, match="'x0' is constant"):
        _ranges(constant)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_refused_by_name(value: float) -> None:
    _, io = image_net(Residual())
    plain = samples_of(io)
    plain.inputs["x0"][4, 0, 0, 0] = value
    with pytest.raises(DataError, match="s/004: calibration input 'x0' holds NaN or infinity"):
        _ranges(plain)


@pytest.mark.parametrize("shift", [0.0, 0.25])
def test_a_constant_inner_tensor_gets_a_range_that_holds_it(shift: float) -> None:
    net, io = zero_gamma(shift)
    plain = samples_of(io)
    made = ptq(net, io, plain)
    (name,) = made.calibration.to_json()["constant"]
    found = made.calibration.ranges[name]
    assert (found.low, found.high, found.method) == (shift, shift, "constant")
    assert found.amax == float(fp16_amax(torch.tensor(shift or 1.0)))
    x_BCHW = plain.tensors(["x0"])[0]
    with torch.no_grad():
        wanted, found = net(x_BCHW).numpy(), made.module(x_BCHW).numpy()
    assert sqnr_db(wanted, found) > 25
    assert Calibration.from_json(json.loads(json.dumps(made.calibration.to_json()))) == made.calibration


def test_a_student_that_always_says_the_same_is_refused() -> None:
    net, io = image_net(Residual())
    with torch.no_grad():
        net.get_parameter("head.weight").zero_()
        net.get_parameter("head.bias").fill_(0.5)
    quantised, placement = build(net, samples_of(io), ["x0"])
    with pytest.raises(DataError, match=r"output 0: the student's output is constant"):
        calibrate(quantised, placement, samples_of(io), ["x0"])


def test_calibration_survives_json() -> None:
    _, io = image_net(Residual())
    found = _ranges(samples_of(io))
    assert Calibration.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert found.to_json()["split"] == "train"
    with pytest.raises(ArtifactError, match="lacks a field"):
        Calibration.from_json({"format": 2, "ranges": {}})
    with pytest.raises(ArtifactError, match="unknown calibration format"):
        Calibration.from_json({"format": 1, "ranges": {}})


def test_input_statistics_describe_each_channel() -> None:
    x = np.zeros((4, 2, 3, 3), np.float32)
    x[:, 1] = np.arange(4, dtype=np.float32)[:, None, None]
    found = input_statistics({"x": x, "flat": np.ones((4, 5), np.float32)})
    assert found["x"]["channel_mean"] == [0.0, 1.5]
    assert found["x"]["channel_std"] == [0.0, pytest.approx(np.std([0, 1, 2, 3]))]
    assert (found["x"]["channel_min"], found["x"]["channel_max"]) == ([0.0, 0.0], [0.0, 3.0])
    assert (found["x"]["min"], found["x"]["max"], found["x"]["samples"]) == (0.0, 3.0, 4)
    assert found["x"]["energy_mean"] == [0.0, 3.5]
    assert found["x"]["energy_std"] == [0.0, pytest.approx(np.std([0, 1, 4, 9]))]
    assert len(found["flat"]["channel_mean"]) == 1


def test_output_statistics_are_root_mean_squares_of_samples() -> None:
    y = np.array([[3.0, -3.0], [0.0, 0.0], [1.0, 7.0]], np.float32)
    found = output_statistics({"y": y, "huge": np.full((2, 3), 1e30, np.float32)})
    assert found["y"] == {"rms_mean": pytest.approx(8 / 3), "rms_std": pytest.approx(np.std([3, 0, 5])),
                          "rms_min": 0.0, "rms_max": 5.0}
    assert found["huge"]["rms_max"] == pytest.approx(1e30), "squares that float32 cannot hold"
