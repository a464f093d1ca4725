"""The TensorRT backend and the CUDA calls below it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fmdeploy.errors import MissingDependencyError, MissingError, ModelFileError
from fmdeploy.runtime.backends.cuda import Bindings, Cuda, CudaError, Library, load_cuda
from fmdeploy.runtime.backends.planfault import PlanError, PlanFault
from fmdeploy.runtime.backends.protocol import Backend, DeviceLostError
from fmdeploy.runtime.backends.tensorrt import TensorRtBackend
from fmdeploy.runtime.backends.tensorrt_api import MODULES, installed, load_api, one_line, version_tuple
from fmdeploy.runtime.backends.tensorrt_engine import device_memory_bytes
from support.bundles import fp32_model, inputs, io_spec, run_model
from support.fake_tensorrt import RECORDING, HostCalls, fake_api, host_cuda


def backend(**options: Any) -> TensorRtBackend:
    cuda = options.pop("cuda", None) or host_cuda()
    return TensorRtBackend(fp32_model(), io_spec(), api=fake_api(**options), cuda=cuda, where="engine.plan")


def test_the_engine_answers_through_names_and_device_memory() -> None:
    found: Backend = backend()
    batch = inputs(1, 16, seed=3)
    answers = found.run(batch)
    expected = run_model(fp32_model(), batch)
    for spec, answer in zip(io_spec().outputs, answers, strict=True):
        assert np.array_equal(answer, expected[spec.name])
    assert (found.provider, found.threads) == ("tensorrt 10.3.0.26", 1)


def test_answers_belong_to_the_caller() -> None:
    found = backend()
    first = found.run(inputs(1, 16, seed=1))
    kept = [answer.copy() for answer in first]
    found.run(inputs(1, 16, seed=2))
    assert all(np.array_equal(a, b) for a, b in zip(first, kept, strict=True))


def test_an_engine_that_does_not_load_says_what_tensorrt_logged() -> None:
    with pytest.raises(PlanError, match="engine.plan: PLAN_INCOMPATIBLE_TENSORRT: TensorRT 10.3.0.26 does not load this engine: Version tag does"):
        backend(loads=False)


def test_an_engine_of_another_task_is_refused() -> None:
    with pytest.raises(ModelFileError, match="not those of io.json"):
        TensorRtBackend(fp32_model(size=8), io_spec(16), api=fake_api(), cuda=host_cuda())


def test_the_error_recorder_and_the_log_are_both_heard() -> None:
    """Where a recorder is set, TensorRT no longer writes errors to the logger; older releases do both."""
    for records in (True, False):
        with pytest.raises(PlanError, match="something new") as caught:
            backend(loads=False, says="something new", records=records)
        assert caught.value.code is PlanFault.INCOMPATIBLE


def test_a_run_that_fails_is_a_typed_error() -> None:
    with pytest.raises(CudaError, match="the engine did not run"):
        backend(runs=False).run(inputs(1, 16, seed=0))
    with pytest.raises(DeviceLostError, match="cudaStreamSynchronize failed with CUDA error 700.*Restart the process"):
        backend(cuda=host_cuda(fail="cudaStreamSynchronize")).run(inputs(1, 16, seed=0))


def test_an_error_that_leaves_the_device_usable_does_not_lose_it() -> None:
    with pytest.raises(CudaError, match="cudaMalloc failed with CUDA error 2") as caught:
        backend(cuda=host_cuda(fail="cudaMalloc", code=2))
    assert not isinstance(caught.value, DeviceLostError)
    assert caught.value.code == 2


def test_what_tensorrt_notices_while_it_runs_is_not_overlooked() -> None:
    engines: list[Any] = []
    found = backend(change=engines.append)
    found.run(inputs(1, 16, seed=0))
    engines[0].whisper = "misaligned address"
    with pytest.raises(CudaError, match="the engine did not run well: misaligned address"):
        found.run(inputs(1, 16, seed=0))
    engines[0].whisper = ""
    found.run(inputs(1, 16, seed=0))


def test_runs_are_launched_as_one_graph() -> None:
    calls = HostCalls()
    found = backend(cuda=Cuda(calls))
    assert found.without_graph == ""
    assert calls.log.count("cudaStreamBeginCapture") == calls.log.count("cudaStreamEndCapture") == 1
    assert len(calls.graphs) == 1, "what was written down is launched; the graph itself was given back"
    calls.log.clear()
    for seed in range(3):
        batch = inputs(1, 16, seed=seed)
        answers, expected = found.run(batch), run_model(fp32_model(), batch)
        assert all(np.array_equal(a, expected[s.name]) for s, a in zip(io_spec().outputs, answers, strict=True))
    assert calls.log == ["cudaGraphLaunch", "cudaStreamSynchronize"] * 3


@pytest.mark.parametrize("step", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiateWithFlags"])
def test_a_graph_that_cannot_be_made_is_said_and_done_without(step: str) -> None:
    calls = HostCalls(fail=step, code=901)
    found = backend(cuda=Cuda(calls))
    assert found.provider == "tensorrt 10.3.0.26 without CUDA graph"
    assert found.without_graph == f"{step} failed with CUDA error 901"
    batch = inputs(1, 16, seed=4)
    expected = run_model(fp32_model(), batch)
    assert np.array_equal(found.run(batch)[0], expected["bev"])
    assert calls.launches == 0
    found.close()
    assert (calls.memory, calls.streams, calls.graphs) == ({}, set(), {})


def test_an_engine_that_refuses_to_be_written_down_runs_call_by_call() -> None:
    def first_run_only(engine: Any) -> None:
        execute = engine.execute_async_v3
        engine.execute_async_v3 = lambda stream: execute(stream) and stream not in RECORDING

    calls = HostCalls()
    found = backend(cuda=Cuda(calls), change=first_run_only)
    assert "the engine did not run" in found.without_graph
    assert not RECORDING, "no capture stays open"
    assert np.array_equal(found.run(inputs(1, 16, seed=4))[0], run_model(fp32_model(), inputs(1, 16, seed=4))["bev"])


def test_a_device_that_is_lost_while_the_graph_is_made_is_not_played_down() -> None:
    calls = HostCalls(fail="cudaGraphInstantiateWithFlags", code=719)
    with pytest.raises(DeviceLostError, match="719"):
        backend(cuda=Cuda(calls))
    assert (calls.memory, calls.streams) == ({}, set()), "nothing is left behind"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_optimization_profiles", 2, "another number of optimisation profiles"),
        ("num_layers", 0, "has no layers"),
        ("weights_loaded", False, "weights are not loaded"),
        ("location", "HOST", "not those of io.json"),
    ],
)
def test_an_engine_is_checked_before_its_first_run(name: str, value: Any, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        backend(change=lambda engine: setattr(engine, name, value))


def test_scratch_memory_is_told_by_old_and_new_releases() -> None:
    assert backend().device_memory_mib == 3
    assert device_memory_bytes(SimpleNamespace(device_memory_size=5)) == 5
    assert device_memory_bytes(SimpleNamespace()) is None


def test_a_wrong_dtype_is_not_cast() -> None:
    batch = {name: array.astype(np.float64) for name, array in inputs(1, 16, seed=0).items()}
    with pytest.raises(TypeError):
        backend().run(batch)


def test_close_gives_every_buffer_back() -> None:
    calls = HostCalls()
    found = backend(cuda=Cuda(calls))
    assert len(calls.memory) == 2 * (len(io_spec().inputs) + len(io_spec().outputs))
    assert len(calls.streams) == 1
    found.close()
    assert (calls.memory, calls.streams, calls.graphs) == ({}, set(), {})
    found.close()  # a second time is no fault


def test_a_machine_without_a_gpu_or_without_cuda_is_missing_something() -> None:
    def nothing(name: str) -> Any:
        raise OSError(name)

    def no_module(name: str) -> Any:
        raise ImportError(name)

    with pytest.raises(MissingError, match="no CUDA runtime") as caught:
        load_cuda(load=nothing, find_module=no_module)
    assert caught.value.exit_code == 3

    def refused(code: int) -> None:
        with pytest.raises(MissingError, match="no NVIDIA GPU"):
            load_cuda(load=lambda name: SimpleNamespace(cudaGetDeviceCount=lambda slot: code), find_module=no_module)

    for code in (34, 35, 100):  # cudaErrorStubLibrary, InsufficientDriver, NoDevice
        refused(code)


def test_ctypes_and_cuda_bindings_are_called_alike() -> None:
    def attribute(slot: Any, number: Any, device: Any) -> int:
        slot._obj.value = {75: 8, 76: 7}[number.value]
        return 0

    assert Cuda(Library(SimpleNamespace(cudaDeviceGetAttribute=attribute))).sm() == "87"
    def end_capture(stream: Any, slot: Any) -> int:  # the one function whose result comes last
        slot._obj.value = stream.value + 1
        return 0

    assert Cuda(Library(SimpleNamespace(cudaStreamEndCapture=end_capture))).end_capture(41) == 42
    module = SimpleNamespace(cudaDeviceAttr=lambda number: ("attr", number), cudaStreamCaptureMode=lambda n: ("mode", n),
                             cudaStreamBeginCapture=lambda stream, mode: (0 if mode == ("mode", 1) else 1,),
                             cudaStreamEndCapture=lambda stream: (0, stream + 1), cudaMemcpyKind=lambda number: ("kind", number),
                             cudaDeviceGetAttribute=lambda attr, device: (0, {75: 8, 76: 7}[attr[1]]),
                             cudaMemcpyAsync=lambda a, b, size, kind, stream: (0 if kind == ("kind", 1) else 1,))
    cuda = Cuda(Bindings(module))
    assert cuda.sm() == "87"
    cuda.copy(1, 2, 3, 1, 0)
    cuda.begin_capture(7)
    assert cuda.end_capture(7) == 8
    with pytest.raises(CudaError):
        cuda.copy(1, 2, 3, 2, 0)


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODULES, "tensorrt", "tensorrt_that_nobody_has")
    assert not installed("tensorrt")
    with pytest.raises(MissingDependencyError, match="tensorrt_that_nobody_has"):
        load_api("tensorrt")


def test_versions_are_compared_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert version_tuple("10.16.2.10-1+cuda13.2") > version_tuple("10.3.0.26")
    monkeypatch.setattr("fmdeploy.runtime.backends.tensorrt_api.require", lambda name: SimpleNamespace(__version__="8.6.2"))
    with pytest.raises(MissingDependencyError, match="8.6.2: this TensorRT is too old"):
        load_api("tensorrt")
    assert load_api("tensorrt-rtx").version == "8.6.2"  # counts its versions on its own


def test_a_log_line_loses_the_remark_on_the_missing_driver() -> None:
    text = "Invalid\nNode [checkMacros.cpp::catchCudaError::203] Error Code 1: Cuda Runtime (CUDA driver version)"
    assert one_line(text) == "Invalid Node"
