"""What a tier shows before it serves: latency and memory against a budget; OpenVINO; which engine is taken."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fmdeploy.arrays import Arrays
from fmdeploy.budgets import AccuracyBudget, Budgets, TargetBudget
from fmdeploy.errors import ConfigError, FmdeployError, MissingError, ModelFileError
from fmdeploy.jetson.preflight import is_installed
from fmdeploy.ortsession import ort_session
from fmdeploy.runtime import loading, open_bundle
from fmdeploy.runtime.backends import openvino as openvino_backend
from fmdeploy.runtime.backends.onnxrt import OrtBackend
from fmdeploy.runtime.backends.planfault import PlanFault
from fmdeploy.runtime.backends.protocol import Backend
from fmdeploy.runtime.bundle import Bundle
from fmdeploy.runtime.engines.rebuild import rebuild
from fmdeploy.runtime.loading import Terms
from fmdeploy.runtime.tiers import TABLE, TIERS, admit_tier, self_test, tier_named
from fmdeploy.runtime.trial import budget_here, trial
from support.bundles import fp32_model, inputs, int8_model, io_spec, make_bundle, run_model
from support.engines import builder, device_bundle, install_tensorrt, make_engine, terms
from support.fake_tensorrt import HostCalls
from support.runtimes import toy_bundle


def budgeted(folder: Path, **targets: TargetBudget) -> Bundle:
    limits = Budgets(accuracy=AccuracyBudget(metric="iou"), target=targets)
    return open_bundle(make_bundle(folder / "bundle", limits=limits).root)


class Paced:
    """A backend that reports the times it is given: the clock of the trial moves only while it runs."""

    provider, threads = "paced", 1
    pace_ms: Iterator[float]

    def __init__(self, *args: Any, **options: Any) -> None:
        self._inner = OrtBackend(*args, **options)

    def run(self, feeds: Arrays) -> Any:
        Paced.now_ns += int(1e6 * next(self.pace_ms))
        return self._inner.run(feeds)

    now_ns = 0


def paced(monkeypatch: pytest.MonkeyPatch, times: Iterator[float]) -> None:
    monkeypatch.setattr(Paced, "pace_ms", times, raising=False)
    monkeypatch.setattr(loading, "OrtBackend", Paced)
    monkeypatch.setattr("fmdeploy.runtime.trial.time", SimpleNamespace(perf_counter_ns=lambda: Paced.now_ns))


def endless(*times: float) -> Iterator[float]:
    while True:
        yield from times


def test_numbers_are_measured_and_reported() -> None:
    backend, report = admit_tier(open_bundle(toy_bundle()), "fp32", 1)
    assert backend is not None
    record = report.to_json()
    assert record["n"] >= 12
    assert 0 < record["best_ms"] <= record["p50_ms"]
    assert record["mib"] >= 0
    assert (record["tier"], record["variant"], record["provider"]) == ("fp32", "fp32", "CPUExecutionProvider")


def test_a_tier_whose_best_run_is_over_the_budget_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = budgeted(tmp_path, here=TargetBudget(p50_ms=5.0))
    paced(monkeypatch, endless(5.5, 9.0))
    backend, report = admit_tier(bundle, "fp32", 1, Terms(target="here"))
    assert backend is None
    assert report.reason == "too slow: best 5.50 ms, median 7.25 ms of 24 runs, the budget is 5 ms", "measured twice"


def test_a_busy_machine_refuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = budgeted(tmp_path, here=TargetBudget(p50_ms=5.0))
    paced(monkeypatch, endless(40.0, 40.0, 4.0))
    report = admit_tier(bundle, "fp32", 1, Terms(target="here"))[1]
    assert report.admitted
    assert report.note == "the machine is busy: best 4.00 ms, median 40.00 ms of 12 runs, the budget is 5 ms"


def test_a_machine_that_was_busy_a_moment_ago_gets_a_second_chance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = budgeted(tmp_path, here=TargetBudget(p50_ms=5.0))
    paced(monkeypatch, iter([*[9.0] * 15, *[2.0] * 12]))
    report = admit_tier(bundle, "fp32", 1, Terms(target="here"))[1]
    assert (report.admitted, report.n, report.best_ms) == (True, 24, 2.0)


def test_a_budget_that_nobody_asked_for_refuses_nothing(tmp_path: Path) -> None:
    bundle = budgeted(tmp_path, here=TargetBudget(p50_ms=1e-6, peak_mib=1e-6))
    assert admit_tier(bundle, "fp32", 1)[1].admitted
    assert not admit_tier(bundle, "fp32", 1, Terms(target="here"))[1].admitted


def test_the_budget_of_this_machine_holds_without_being_asked_for(tmp_path: Path) -> None:
    mine, other = TargetBudget(machine=platform.machine(), p50_ms=1e-6), TargetBudget(machine="vax", p50_ms=1e-6)
    bundle = budgeted(tmp_path, mine=mine, other=other, anywhere=TargetBudget(p50_ms=1.0))
    assert budget_here(bundle, None) == mine
    assert budget_here(bundle, "") is None
    assert budget_here(bundle, "other") is None, "a budget for another machine is not measured here"
    assert budget_here(bundle, "anywhere") == TargetBudget(p50_ms=1.0)
    assert "too slow" in admit_tier(bundle, "fp32", 1)[1].reason
    with pytest.raises(ConfigError, match="choose a target"):
        admit_tier(bundle, "fp32", 1, Terms(target="nowhere"))


def test_memory_that_cannot_be_measured_does_not_pass_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = budgeted(tmp_path, here=TargetBudget(peak_mib=1e6))
    assert admit_tier(bundle, "fp32", 1, Terms(target="here"))[1].admitted
    monkeypatch.setattr("fmdeploy.runtime.tiers.MemoryMark", SimpleNamespace(now=lambda root: None))
    report = admit_tier(bundle, "fp32", 1, Terms(target="here"))[1]
    assert report.reason == "its memory cannot be measured here, and the budget limits it"
    assert admit_tier(bundle, "fp32", 1)[1].admitted


def test_a_trial_runs_every_golden_sample_and_some_twice() -> None:
    bundle, seen = open_bundle(toy_bundle()), []

    class Counting(OrtBackend):
        def run(self, feeds: Arrays) -> Any:
            seen.append(feeds["lidar"].tobytes())
            return super().run(feeds)

    shown = trial(bundle, "fp32", Counting(fp32_model(), bundle.io))
    assert len(set(seen)) == len(bundle.golden)
    assert len(shown.times_ms) == 12
    assert len(seen) == 15
    assert shown.unrepeatable == ""


def test_the_self_test_of_a_running_tier() -> None:
    bundle = open_bundle(toy_bundle())
    backend = OrtBackend(fp32_model(), bundle.io)
    assert self_test(bundle, "fp32", backend, backend.provider, range(2)).admitted
    assert "golden vectors differ" in self_test(bundle, "fp32", OrtBackend(fp32_model(seed=1), bundle.io), "x", [0]).reason


def test_the_table_of_tiers() -> None:
    assert TIERS == ("trt-int8", "trt-fp16", "cuda-fp16", "int8-cpu", "openvino-int8", "fp32")
    assert [TABLE[name].variant for name in TIERS] == ["int8", "fp16", "fp16", "int8-cpu", "int8", "fp32"]
    assert (tier_named("fp16").backend, tier_named("fp16").variant) == ("cpu", "fp16"), "any model file runs on the CPU"


def test_a_session_is_made_for_one_provider() -> None:
    assert ort_session(fp32_model()).get_providers() == ["CPUExecutionProvider"]
    with pytest.raises(MissingError, match="expected CUDAExecutionProvider.*onnxruntime-gpu"):
        ort_session(fp32_model(), provider="CUDAExecutionProvider")
    with pytest.raises(ModelFileError, match="model.onnx: ONNX Runtime refuses the model"):
        ort_session(b"nothing", where="model.onnx")


# OpenVINO
@pytest.fixture
def openvino() -> Any:
    return pytest.importorskip("openvino")


def test_openvino_runs_the_file_for_tensorrt_unchanged(openvino: Any, tmp_path: Path) -> None:
    bundle = device_bundle(tmp_path)
    backend, report = admit_tier(bundle, "openvino-int8", 1)
    assert backend is not None
    assert report.variant == "int8"
    assert "layers in 8 bits" in str(report.provider)
    assert "CPU, 0 of" not in str(report.provider)
    batch = inputs(1, seed=5)
    first = backend.run(batch)
    kept = [array.copy() for array in first]
    backend.run(inputs(1, seed=6))
    assert all(np.array_equal(a, b) for a, b in zip(first, kept, strict=True)), "answers belong to the caller"
    expected = run_model(int8_model(), batch)
    assert [array.shape for array in first] == [expected[spec.name].shape for spec in bundle.io.outputs]


def test_openvino_refuses_what_it_would_run_in_float_or_not_at_all(openvino: Any) -> None:
    make = openvino_backend.OpenVinoBackend
    with pytest.raises(ModelFileError, match="runs no layer of it in 8 bits"):
        make(fp32_model(), io_spec())
    with pytest.raises(ModelFileError, match="OpenVINO refuses the model"):
        make(b"nothing", io_spec())
    with pytest.raises(ModelFileError, match="does not fit io.json"):
        make(fp32_model(32), io_spec())
    other = io_spec().model_copy(update={"outputs": io_spec().outputs[:1]})
    with pytest.raises(ModelFileError, match="outputs are not those of io.json"):
        make(fp32_model(), other)
    backend: Backend = make(fp32_model(), io_spec(), int8=False)
    expected = run_model(fp32_model(), inputs(1, seed=1))
    assert np.allclose(backend.run(inputs(1, seed=1))[0], expected["bev"], atol=1e-5)


@pytest.mark.parametrize(("devices", "precision"), [(["GPU"], np.float32), (["CPU"], np.float16)])
def test_openvino_elsewhere_or_in_another_precision_is_refused(devices: list[str], precision: Any) -> None:
    properties = {"EXECUTION_DEVICES": devices, "INFERENCE_PRECISION_HINT": SimpleNamespace(to_dtype=lambda: precision)}
    with pytest.raises(MissingError, match="elsewhere or in another precision"):
        openvino_backend._check_device(SimpleNamespace(get_property=properties.__getitem__), "m")


def test_openvino_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "is_installed", lambda name: False)
    assert "pip install 'fmdeploy[openvino]'" in admit_tier(device_bundle(tmp_path), "openvino-int8", 1)[1].reason


# Engines
def test_the_engine_of_todays_power_mode_is_preferred_and_another_one_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_tensorrt(monkeypatch)
    bundle, here = device_bundle(tmp_path), terms(tmp_path)
    make_engine(tmp_path / "engines/a", bundle, power_mode="15W")
    report = admit_tier(bundle, "trt-int8", 1, here)[1]
    assert (report.admitted, report.note) == (True, "built in power mode 15W, this is None")
    make_engine(tmp_path / "engines/b", bundle)
    assert admit_tier(bundle, "trt-int8", 1, here)[1].note == ""


def test_a_folder_may_be_the_engine_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_tensorrt(monkeypatch)
    bundle, here = device_bundle(tmp_path), terms(tmp_path)
    make_engine(tmp_path / "one", bundle)
    alone = Terms(engines=tmp_path / "one", place=here.place)
    assert admit_tier(bundle, "trt-int8", 1, alone)[1].admitted
    nowhere = Terms(engines=tmp_path / "nowhere", place=here.place)
    assert "PLAN_MISSING" in admit_tier(bundle, "trt-int8", 1, nowhere)[1].reason
    assert "no folder of engines was named" in admit_tier(bundle, "trt-int8", 1, Terms(place=here.place))[1].reason


def test_a_new_engine_has_no_place_inside_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_tensorrt(monkeypatch)
    bundle, here = device_bundle(tmp_path), terms(tmp_path)
    make_engine(tmp_path / "one", bundle, l4t="36.3.0")
    alone = Terms(engines=tmp_path / "one", place=here.place, build_missing=True, build_command=builder(tmp_path))
    reason = admit_tier(bundle, "trt-int8", 1, alone)[1].reason
    assert "PLAN_INCOMPATIBLE_L4T" in reason
    assert "Name the folder in which engines lie" in reason
    damaged = make_engine(tmp_path / "two", bundle).path("engine.plan")
    damaged.write_bytes(b"")
    again = Terms(engines=tmp_path / "two", place=here.place, build_missing=True, build_command=builder(tmp_path))
    assert admit_tier(bundle, "trt-int8", 1, again)[1].admitted, "the unfit one was set aside, so there is a folder now"
    assert (tmp_path / "two/bundle-int8/engine.plan").is_file()


def test_the_real_command_understands_what_it_is_told(tmp_path: Path) -> None:
    if is_installed("tensorrt"):
        pytest.skip("TensorRT is installed: this would build")
    bundle, here = device_bundle(tmp_path), terms(tmp_path)
    assert here.place is not None
    with pytest.raises(FmdeployError, match="the build of int8 ended with status 3: .*tensorrt"):
        rebuild(bundle, "int8", tmp_path / "engines", place=here.place, floor_mib=1)


def test_a_graph_that_was_not_made_is_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_tensorrt(monkeypatch)
    bundle = device_bundle(tmp_path)
    make_engine(tmp_path / "engines/a", bundle)
    report = admit_tier(bundle, "trt-int8", 1, terms(tmp_path, calls=HostCalls(fail="cudaStreamEndCapture", code=901)))[1]
    assert report.provider == "tensorrt 10.3.0.26 without CUDA graph"
    assert report.note == "no CUDA graph: cudaStreamEndCapture failed with CUDA error 901"


def test_a_refused_tier_gives_the_devices_memory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from support.fake_tensorrt import fake_api

    install_tensorrt(monkeypatch, fake_api(gain=3.0))
    bundle, calls = device_bundle(tmp_path), HostCalls()
    make_engine(tmp_path / "engines/a", bundle)
    report = admit_tier(bundle, "trt-int8", 1, terms(tmp_path, calls=calls))[1]
    assert "golden vectors differ" in report.reason
    assert (calls.memory, calls.streams, calls.graphs) == ({}, set(), {})


def test_no_gpu_is_said_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fmdeploy.runtime.backends.cuda import Cuda, load_cuda
    from fmdeploy.runtime.engines.key import Place

    def gone() -> Cuda:
        return load_cuda(load=lambda name: SimpleNamespace(cudaGetDeviceCount=lambda slot: 35), find_module=refuse)

    def refuse(name: str) -> Any:
        raise ImportError(name)

    install_tensorrt(monkeypatch)
    bundle, here = device_bundle(tmp_path), terms(tmp_path)
    make_engine(tmp_path / "engines/a", bundle)
    assert here.place is not None
    lost = Terms(engines=here.engines, place=Place(here.place.root, gone))
    assert "there is no NVIDIA GPU here" in admit_tier(bundle, "trt-int8", 1, lost)[1].reason


def test_the_page_knows_every_tier_and_every_code(root: Path) -> None:
    text = (root / "docs/tiers.md").read_text()
    rows = [line.split("|")[1].strip().strip("`") for line in text.splitlines() if line.startswith("| `")]
    assert rows == [*TIERS, *(fault.value for fault in PlanFault)]
