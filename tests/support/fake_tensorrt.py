"""A device for tests that have none: CUDA on host memory, and an engine that is an ONNX file run by ONNX Runtime.

It stands for what cannot be had here, the GPU. The code under test (name-based I/O, buffers, copies, CUDA graphs, the
error recorder, the golden check) is the code that runs on the device. Refusals of plans speak the words that the library
of TensorRT-RTX 1.7.1 was heard to speak, or has in its strings.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import re
from collections.abc import Callable
from enum import Enum
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from fmdeploy.runtime.backends.cuda import Cuda
from fmdeploy.runtime.backends.tensorrt_api import Api

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8, "tensor(int64)": np.int64}
MAGIC = b"ftrt"
HOST_CODE = 0x01
RECORDING: dict[int, list[Callable[[], object]]] = {}  # stream → work that is written down, of all devices
HANDLES = itertools.count(1000)


def do_on(stream: int, work: Callable[[], object]) -> None:
    """Do work, or write it down where the stream is being captured."""
    if stream in RECORDING:
        RECORDING[stream].append(work)
    else:
        work()


class HostCalls:
    """CUDA runtime functions on host memory.

    Args:
        devices: How many GPUs there are.
        fail: Function that returns an error code.
        code: That code.
        multiprocessors: Of the GPU.
    """

    def __init__(self, devices: int = 1, fail: str = "", multiprocessors: int = 8, code: int = 700) -> None:
        self.devices, self.fail, self.multiprocessors, self.code = devices, fail, multiprocessors, code
        self.streams: set[int] = set()
        self.memory: dict[int, Any] = {}
        self.graphs: dict[int, list[Callable[[], object]]] = {}
        self.launches = 0
        self.log: list[str] = []

    def call(self, name: str, *arguments: int, result: bool = False) -> tuple[int, int]:
        self.log.append(name)
        if name == self.fail:
            if name == "cudaStreamEndCapture":
                RECORDING.pop(arguments[0], None)
            return self.code, 0
        words = re.findall("[A-Z][a-z]*", name)  # cudaStreamDestroy → _stream_destroy
        found: tuple[int, int] = getattr(self, "_" + "_".join(words).lower())(*arguments)
        return found

    def _get_device_count(self) -> tuple[int, int]:
        return (0, self.devices) if self.devices else (35, 0)

    def _device_get_attribute(self, number: int, device: int) -> tuple[int, int]:
        return 0, {75: 8, 76: 7, 16: self.multiprocessors}[number]

    def _malloc(self, size: int) -> tuple[int, int]:
        if any(RECORDING.get(stream) is not None for stream in self.streams):
            return 900, 0  # cudaErrorStreamCaptureUnsupported: no allocation while a stream is captured
        block = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    _malloc_host = _malloc

    def _free(self, address: int) -> tuple[int, int]:
        del self.memory[address]
        return 0, 0

    _free_host = _free

    def _stream_create_with_flags(self, flags: int) -> tuple[int, int]:
        self.streams.add(stream := next(HANDLES))
        return 0, stream

    def _stream_destroy(self, stream: int) -> tuple[int, int]:
        self.streams.remove(stream)
        return 0, 0

    def _memcpy_async(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[int, int]:
        do_on(stream, partial(ctypes.memmove, target, source, size))
        return 0, 0

    def _stream_synchronize(self, stream: int) -> tuple[int, int]:
        return (900, 0) if stream in RECORDING else (0, 0)

    def _stream_begin_capture(self, stream: int, mode: int) -> tuple[int, int]:
        RECORDING[stream] = []
        return 0, 0

    def _stream_end_capture(self, stream: int) -> tuple[int, int]:
        self.graphs[graph := next(HANDLES)] = RECORDING.pop(stream)
        return 0, graph

    def _graph_instantiate_with_flags(self, graph: int, flags: int) -> tuple[int, int]:
        self.graphs[executable := next(HANDLES)] = list(self.graphs[graph])
        return 0, executable

    def _graph_launch(self, executable: int, stream: int) -> tuple[int, int]:
        self.launches += 1
        for work in self.graphs[executable]:
            work()
        return 0, 0

    def _graph_destroy(self, graph: int) -> tuple[int, int]:
        del self.graphs[graph]
        return 0, 0

    _graph_exec_destroy = _graph_destroy


def host_cuda(devices: int = 1, fail: str = "", multiprocessors: int = 8, code: int = 700) -> Cuda:
    """A GPU of compute capability 8.7 that is host memory."""
    return Cuda(HostCalls(devices, fail, multiprocessors, code))


class TensorIOMode(Enum):
    """As in TensorRT."""

    INPUT = 1
    OUTPUT = 2


class Engine:
    """An ONNX file behind the name-based interface of ICudaEngine and IExecutionContext."""

    num_layers, num_optimization_profiles, device_memory_size_v2 = 7, 1, 3 * 2**20

    def __init__(self, model: bytes, gain: float, runs: bool, noise: float, recorder: Any) -> None:
        self._session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self._specs = {arg.name: (TensorIOMode.INPUT, arg) for arg in self._session.get_inputs()}
        self._specs |= {arg.name: (TensorIOMode.OUTPUT, arg) for arg in self._session.get_outputs()}
        self._addresses: dict[str, int] = {}
        self._gain, self._runs, self._noise, self._recorder = gain, runs, noise, recorder
        self._random = np.random.default_rng(0)
        self.location = "DEVICE"
        self.whisper = ""  # an error that TensorRT notices although the enqueue was accepted

    @property
    def num_io_tensors(self) -> int:
        return len(self._specs)

    def get_tensor_name(self, index: int) -> str:
        return str(list(self._specs)[index])

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self._specs[name][0]

    def get_tensor_dtype(self, name: str) -> str:
        return str(self._specs[name][1].type)

    def get_tensor_location(self, name: str) -> str:
        return self.location

    def get_tensor_shape(self, name: str) -> list[int]:
        return list(self._specs[name][1].shape)

    def create_execution_context(self) -> Engine:
        return self

    def create_engine_inspector(self) -> Any:
        return SimpleNamespace(get_engine_information=lambda form: json.dumps({"Layers": [{"Name": "all", "format": form}]}))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return name in self._specs

    def execute_async_v3(self, stream: int) -> bool:
        if not self._runs:
            return False
        do_on(stream, self._execute)
        return True

    def _execute(self) -> None:
        if self.whisper:
            self._recorder.report_error("ErrorCodeTRT.FAILED_EXECUTION", self.whisper)
        feeds = {name: self._view(name).copy() for name, (mode, _) in self._specs.items() if mode is TensorIOMode.INPUT}
        names = [arg.name for arg in self._session.get_outputs()]
        for name, value in zip(names, self._session.run(names, feeds), strict=True):
            noise = self._noise * self._random.normal(size=value.shape) * np.abs(value).max()
            self._view(name)[...] = value * np.float32(self._gain) + noise.astype(value.dtype)

    def _view(self, name: str) -> Any:
        dtype, shape = np.dtype(DTYPES[self.get_tensor_dtype(name)]), self.get_tensor_shape(name)
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer(memoryview((ctypes.c_uint8 * size).from_address(self._addresses[name])), dtype).reshape(shape)


def plan_of(model: bytes, *, version: tuple[int, int, int, int] = (10, 3, 0, 26), sm: int = 87, flags: int = 0) -> bytes:
    """A plan with a header like TensorRT's: magic tag, size, version; behind it what a real plan keeps in its body."""
    head = MAGIC + bytes(12) + (len(model) + 30).to_bytes(8, "little") + bytes(version)
    return head + bytes([sm, flags]) + model


def refusal(plan: bytes, version: str, sm: int = 87) -> str:
    """What TensorRT says about a plan that it does not load; empty where it loads."""
    if plan[:4] != MAGIC:
        return ("IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion header.magicTag == "
                "kEXPECTED_MAGIC_TAG failed.Trying to load an engine created with incompatible serialization version "
                "(0 != 1953657974). Check that the engine was not created using safety runtime, same OS was used and "
                "version compatibility parameters were set accordingly and that it is a TRT engine file.)")
    if int.from_bytes(plan[16:24], "little") != len(plan):
        return ("IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion plan.header.size == "
                "blobSize failed.)")
    if plan[29] & HOST_CODE:
        return "Cannot deserialize engine with lean runtime since IRuntime::getEngineHostCodeAllowed() is false."
    if ".".join(map(str, plan[24:28])) != version:
        return ("1: [stdArchiveReader.cpp::StdArchiveReader::40] Error Code 1: Serialization (Serialization assertion "
                "stdVersionRead == serializationVersion failed.Version tag does not match. Note: Current Version: 0, "
                "Serialized Engine Version: 43)")
    if plan[28] != sm:
        return ("6: The engine plan file is generated on an incompatible device, expecting compute "
                f"{sm // 10}.{sm % 10} got compute {plan[28] // 10}.{plan[28] % 10}, please rebuild.")
    return ""


def fake_api(
    *, version: str = "10.3.0.26", gain: float = 1.0, loads: bool = True, runs: bool = True, noise: float = 0.0,
    says: str = "Version tag does not match", records: bool = True, change: Callable[[Engine], None] | None = None,
) -> Api:
    """TensorRT whose engines are ONNX files, bare or behind a header (`plan_of`).

    Args:
        version: Its version.
        gain: Falsifies outputs.
        loads: Whether a bare ONNX file loads; if not, it `says` why.
        runs: Whether an enqueue is accepted.
        noise: Standard deviation of what comes on top of outputs, relative to the largest one.
        says: The complaint.
        records: Complaints go to the error recorder where one is set; False: to the logger, as without one.
        change: Alters a loaded engine.
    """
    module: Any = ModuleType("tensorrt")

    class ILogger:
        pass

    class IErrorRecorder:
        pass

    class Runtime:
        engine_host_code_allowed, error_recorder = None, None

        def __init__(self, log: Any) -> None:
            self.log = log

        def complain(self, text: str) -> None:
            if records and self.error_recorder is not None:
                self.error_recorder.report_error("ErrorCodeTRT.UNSPECIFIED_ERROR", text)
            else:
                self.log.log("Severity.ERROR", text)

        def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
            assert self.engine_host_code_allowed is False
            self.log.log("Severity.INFO", f"Loaded engine size: {len(plan) >> 20} MiB")
            bare = plan[:1] == b"\x08"  # an ONNX file begins with its IR version
            text = says if bare else refusal(plan, version)
            if not loads if bare else text:
                if text:
                    self.complain(text)
                return None
            engine = Engine(plan if bare else plan[30:], gain, runs, noise, self.error_recorder)
            if change is not None:
                change(engine)
            return engine

    module.__version__, module.ILogger, module.Runtime, module.TensorIOMode = version, ILogger, Runtime, TensorIOMode
    module.IErrorRecorder, module.TensorLocation = IErrorRecorder, SimpleNamespace(DEVICE="DEVICE", HOST="HOST")
    module.nptype = DTYPES.__getitem__
    module.LayerInformationFormat = SimpleNamespace(JSON="json")
    return Api("tensorrt", module)
