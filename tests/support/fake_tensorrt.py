"""A device for tests that have none: CUDA on host memory, and an engine that is an ONNX file run by ONNX Runtime.

It stands for what cannot be had here, the GPU. The code under test (name-based I/O, buffers, copies, the golden check)
is the code that runs on the device.
"""

from __future__ import annotations

import ctypes
import json
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from fmdeploy.runtime.backends.cuda import Cuda
from fmdeploy.runtime.backends.tensorrt_api import Api

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8, "tensor(int64)": np.int64}


class HostCalls:
    """CUDA runtime functions on host memory; `fail` names one that returns an error code."""

    def __init__(self, devices: int = 1, fail: str = "", multiprocessors: int = 8) -> None:
        self.devices, self.fail, self.multiprocessors = devices, fail, multiprocessors
        self.streams = 0
        self.memory: dict[int, Any] = {}

    def call(self, name: str, *arguments: int, result: bool = False) -> tuple[int, int]:
        if name == self.fail:
            return 700, 0
        if name == "cudaGetDeviceCount":
            return (0, self.devices) if self.devices else (35, 0)
        if name == "cudaDeviceGetAttribute":
            return 0, {75: 8, 76: 7, 16: self.multiprocessors}[arguments[0]]
        if name in ("cudaMalloc", "cudaMallocHost"):
            block = ctypes.create_string_buffer(arguments[0])
            self.memory[ctypes.addressof(block)] = block
            return 0, ctypes.addressof(block)
        if name in ("cudaFree", "cudaFreeHost"):
            del self.memory[arguments[0]]
            return 0, 0
        self.streams += {"cudaStreamCreate": 1, "cudaStreamDestroy": -1}.get(name, 0)
        if name == "cudaMemcpyAsync":
            ctypes.memmove(arguments[0], arguments[1], arguments[2])
        return 0, 7 if result else 0


def host_cuda(devices: int = 1, fail: str = "", multiprocessors: int = 8) -> Cuda:
    """A GPU of compute capability 8.7 that is host memory."""
    return Cuda(HostCalls(devices, fail, multiprocessors))


class TensorIOMode(Enum):
    """As in TensorRT."""

    INPUT = 1
    OUTPUT = 2


class Engine:
    """An ONNX file behind the name-based interface of ICudaEngine and IExecutionContext."""

    def __init__(self, model: bytes, gain: float, runs: bool) -> None:
        self._session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self._specs = {arg.name: (TensorIOMode.INPUT, arg) for arg in self._session.get_inputs()}
        self._specs |= {arg.name: (TensorIOMode.OUTPUT, arg) for arg in self._session.get_outputs()}
        self._addresses: dict[str, int] = {}
        self._gain, self._runs = gain, runs

    @property
    def num_io_tensors(self) -> int:
        return len(self._specs)

    def get_tensor_name(self, index: int) -> str:
        return str(list(self._specs)[index])

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self._specs[name][0]

    def get_tensor_dtype(self, name: str) -> str:
        return str(self._specs[name][1].type)

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
        feeds = {name: self._view(name).copy() for name, (mode, _) in self._specs.items() if mode is TensorIOMode.INPUT}
        names = [arg.name for arg in self._session.get_outputs()]
        for name, value in zip(names, self._session.run(names, feeds), strict=True):
            self._view(name)[...] = value * np.float32(self._gain)
        return self._runs

    def _view(self, name: str) -> Any:
        dtype, shape = np.dtype(DTYPES[self.get_tensor_dtype(name)]), self.get_tensor_shape(name)
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer(memoryview((ctypes.c_uint8 * size).from_address(self._addresses[name])), dtype).reshape(shape)


def fake_api(*, version: str = "10.3.0.26", gain: float = 1.0, loads: bool = True, runs: bool = True) -> Api:
    """TensorRT whose engines are ONNX files; `gain` falsifies outputs, `loads` and `runs` make it fail."""
    module: Any = ModuleType("tensorrt")

    class ILogger:
        pass

    class Runtime:
        def __init__(self, log: Any) -> None:
            self.log = log

        def deserialize_cuda_engine(self, engine: bytes) -> Engine | None:
            if not loads:
                self.log.log("Severity.ERROR", "Version tag does not match")
                return None
            return Engine(engine, gain, runs)

    module.__version__, module.ILogger, module.Runtime, module.TensorIOMode = version, ILogger, Runtime, TensorIOMode
    module.nptype = DTYPES.__getitem__
    module.LayerInformationFormat = SimpleNamespace(JSON="json")
    return Api("tensorrt", module)
