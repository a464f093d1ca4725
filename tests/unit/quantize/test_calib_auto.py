"""`auto` picks by measurement, `overrides` are obeyed, and samples that may not calibrate are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.data.from_arrays import write_arrays
from fmdeploy.errors import ConfigError, DataError
from fmdeploy.evaluate.sqnr import sqnr_db
from fmdeploy.iospec import IOSpec
from fmdeploy.quantize import auto, modelopt
from fmdeploy.quantize.build import build
from fmdeploy.quantize.calibrate import Calibration, CalibrationSet, calibrate
from fmdeploy.quantize.calibrators import NAMES, Calibrator
from fmdeploy.quantize.grid import STEPS
from fmdeploy.quantize.ptq import ptq
from fmdeploy.quantize.samples import check_inputs, draw
from fmdeploy.task import Arrays, load_task
from support.quantize_nets import Residual, image_net, io_of, samples_of

TASK = load_task("image-classification")


def _calibrated(
    calibrator: Calibrator, samples: CalibrationSet, overrides: dict[str, Calibrator] | None = None
) -> tuple[nn.Module, Calibration]:
    torch.manual_seed(0)
    net, _ = image_net(Residual())
    module, placement = build(net, samples, ["x0"])
    return module, calibrate(module, placement, samples, ["x0"], calibrator=calibrator, overrides=overrides)


def _samples(count: int = 20) -> tuple[IOSpec, CalibrationSet]:
    io = io_of((3, 16, 16), outputs=((4,),))
    return io, samples_of(io, count)


@pytest.mark.parametrize("calibrator", NAMES)
def test_every_calibrator_gives_a_close_student_on_the_float16_grid(calibrator: Calibrator) -> None:
    io, samples = _samples()
    module, found = _calibrated(calibrator, samples)
    assert found.calibrator == calibrator
    for row in found.ranges.values():
        assert np.float16(row.amax / STEPS) * np.float64(STEPS) == row.amax
        assert row.amax <= max(abs(row.low), abs(row.high)) * (1 + 2.0**-10)
        assert 0 <= row.clipped < 0.1
        assert row.max_over_rms > 1
        assert list(row.percentiles) == ["50", "99", "99.9", "99.99"]
    torch.manual_seed(0)
    net, _ = image_net(Residual())
    x = samples_of(io, 16, seed=9).tensors(["x0"])
    with torch.no_grad():
        assert sqnr_db(net(*x).numpy(), module(*x).numpy()) > 15


@pytest.mark.parametrize("calibrator", NAMES)
def test_order_of_samples_changes_nothing(calibrator: Calibrator) -> None:
    _, samples = _samples()
    order = np.random.default_rng(1).permutation(len(samples))
    _, plain = _calibrated(calibrator, samples)
    _, shuffled = _calibrated(calibrator, samples.take([int(k) for k in order]))
    assert shuffled.ranges == plain.ranges
    assert shuffled.state == plain.state != ""
    stored = Calibration.from_json(json.loads(json.dumps(plain.to_json())))
    assert stored == plain


def test_auto_takes_the_best_it_measured_and_records_the_others() -> None:
    _, samples = _samples()
    _, found = _calibrated("auto", samples)
    assert {row.method for row in found.ranges.values()} <= {"max", "mse", "percentile", "entropy"}
    for row in found.ranges.values():
        assert sorted(name for each in row.candidates for name in each.calibrators) == sorted(set(NAMES) - {"auto"})
        assert len({each.amax for each in row.candidates}) == len(row.candidates), "equal candidates are tried once"
        best = max(row.candidates, key=lambda each: each.db)
        assert row.method == best.calibrators[0]
    assert any(len(row.candidates) > 1 for row in found.ranges.values())


def test_what_auto_measures_is_the_error_at_the_outputs_of_that_tensor_alone() -> None:
    _, samples = _samples()
    _, judges = auto.split(samples)
    module, found = _calibrated("auto", samples)
    row = found.ranges["act_001"]
    torch.manual_seed(0)
    net, _ = image_net(Residual())
    x = judges.tensors(["x0"])
    with torch.no_grad(), modelopt.float_mode(module):
        quantizer: Any = module.get_submodule("quantizers.act_001.input_quantizer")
        quantizer.enable_quant()
        for each in row.candidates:
            quantizer.amax = torch.tensor(each.amax)
            assert sqnr_db(net(*x).numpy(), module(*x).numpy()) == pytest.approx(each.db, abs=0.2)


def test_judges_have_not_made_the_ranges_where_there_are_enough() -> None:
    _, samples = _samples(20)
    makers, judges = auto.split(samples)
    assert sorted(makers.ids + judges.ids) == list(samples.ids)
    assert len(judges) == 5
    few = samples.take(range(5))
    assert auto.split(few)[0] is few
    assert set(auto.split(few)[1].ids) == set(few.ids)


def test_cost_of_auto_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "RUNS", 40)
    _, samples = _samples(64)
    torch.manual_seed(0)
    net, _ = image_net(Residual())
    runs: list[int] = []
    module, placement = build(net, samples, ["x0"])
    handle = module.register_forward_pre_hook(lambda *_: runs.append(1))
    found = calibrate(module, placement, samples, ["x0"], calibrator="auto")
    handle.remove()
    trials = sum(len(row.candidates) for row in found.ranges.values() if len(row.candidates) > 1)
    assert trials > 4
    assert len(runs) <= len(samples) + auto.LEAST * (trials + 1)


def test_overrides_reach_the_tensor_and_those_that_share_its_scale() -> None:
    _, samples = _samples()
    _, plain = _calibrated("max", samples)
    _, found = _calibrated("max", samples, overrides={"act_001": "percentile"})
    assert found.ranges["act_001"].method == "percentile"
    assert found.ranges["act_001"].amax < plain.ranges["act_001"].amax
    assert {name: row for name, row in found.ranges.items() if name != "act_001"} == {
        name: row for name, row in plain.ranges.items() if name != "act_001"}


def test_unknown_names_are_refused_with_near_ones() -> None:
    _, samples = _samples()
    with pytest.raises(ConfigError, match="no quantised tensor is called 'act_01'.*near: act_001"):
        _calibrated("max", samples, overrides={"act_01": "mse"})
    with pytest.raises(ConfigError, match="kl: no such calibrator.*expected max, entropy, percentile, mse, auto"):
        _calibrated("kl", samples)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    rng = np.random.default_rng(0)
    arrays: Arrays = {"image": rng.random((12, 3, 32, 32), np.float32), "label": rng.integers(0, 10, 12)}
    arrays["image"][11] = arrays["image"][0]  # a test frame that equals a training frame is no proof of anything
    out = tmp_path_factory.mktemp("auto") / "data"
    write_arrays(out, arrays, {"train": np.arange(8), "val": np.arange(8, 10), "test": np.arange(10, 12)})
    return open_dataset(out)


def test_own_arrays_that_overlap_evaluation_are_refused(data: Dataset) -> None:
    drawn = draw(TASK, data, count=8, seed=0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30 * 30, 10))

    def made(samples: CalibrationSet) -> None:
        ptq(net, TASK.io, samples, judged_on=(TASK, data))

    made(drawn)
    held = TASK.samples(data, "test")
    with pytest.raises(DataError, match=f"{held.ids[0]}: calibration sample overlaps evaluation.*found test"):
        made(replace(drawn, ids=(held.ids[0], *drawn.ids[1:])))
    renamed = {"image": np.concatenate([drawn.inputs["image"][:7], held.batch(np.array([0]))[0]["image"]])}
    with pytest.raises(DataError, match=f"{drawn.ids[7]}: calibration sample holds the values of a held-out one"):
        made(replace(drawn, inputs=renamed))


def test_inputs_outside_their_range_are_refused_by_name_and_sample() -> None:
    io, samples = _samples(6)
    check_inputs(samples, io)
    samples.inputs["x0"][4, 1, 2, 3] = 255.0
    with pytest.raises(DataError, match=r"s/004: calibration input 'x0' leaves its range.*expected 0 to 1, found 255"):
        check_inputs(samples, io)


def test_ptq_refuses_own_arrays_that_break_the_specification() -> None:
    net, io = image_net(Residual())
    samples = samples_of(io)
    with pytest.raises(DataError, match=r"'x0' leaves its range.*expected 0 to 1, found .*Preprocess once.*: none"):
        ptq(net, io, replace(samples, inputs={"x0": samples.inputs["x0"] * 255}))


def test_inputs_of_another_shape_type_or_number_are_refused() -> None:
    io, samples = _samples(6)
    with pytest.raises(DataError, match="'x0' is of another shape or type.*float32.*float64"):
        check_inputs(replace(samples, inputs={"x0": samples.inputs["x0"].astype(np.float64)}), io)
    with pytest.raises(DataError, match="'x0' is missing"):
        check_inputs(replace(samples, inputs={"x1": samples.inputs["x0"]}), io)
    with pytest.raises(DataError, match="another number of samples than there are ids.*expected 5, found 6"):
        check_inputs(replace(samples, ids=samples.ids[:5]), io)


def test_data_outside_the_specified_range_is_refused_when_drawn(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays: Arrays = {"image": rng.random((6, 3, 32, 32), np.float32) * 255, "label": rng.integers(0, 10, 6)}
    write_arrays(tmp_path / "data", arrays, {"train": np.arange(4), "test": np.arange(4, 6)})
    with pytest.raises(DataError, match="'image' leaves its range.*expected 0 to 1"):
        draw(TASK, open_dataset(tmp_path / "data"), count=4, seed=0)
