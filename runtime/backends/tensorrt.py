"""A TensorRT engine behind the backend protocol: name-based I/O, `execute_async_v3`, nothing that a release removed."""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.errors import ModelFileError
from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.runtime.backends.cuda import DEVICE_TO_HOST, HOST_TO_DEVICE, Cuda, CudaError, load_cuda
from fmdeploy.runtime.backends.tensorrt_api import Api, capturing_logger, complaints


@dataclass(frozen=True)
class Buffer:
    """One input or output: page-locked host memory seen as an array, and its place on the device."""

    name: str
    host: Array
    host_address: int
    device: int


class TensorRtBackend:
    """One engine in one execution context, with its own stream and buffers."""

    def __init__(self, engine: bytes, io: IOSpec, *, api: Api, cuda: Cuda | None = None, where: object = None) -> None:
        """Load an engine that was built on this machine.

        Args:
            engine: The serialised engine; its bytes were verified before, since an engine is code.
            io: What its inputs and outputs must be.
            api: TensorRT.
            cuda: The CUDA runtime; default: this machine's.
            where: Names the engine in errors.

        Raises:
            MissingError: There is no GPU here.
            ModelFileError: TensorRT does not load it (its log is in the text), or its inputs and outputs are not
                those of `io`.
        """
        self._cuda = load_cuda() if cuda is None else cuda
        self._api, self._where, self._io = api, where, io
        self._log = capturing_logger(api)
        self._runtime = api.module.Runtime(self._log)
        self._engine = self._loaded(self._runtime.deserialize_cuda_engine(engine), "does not load this engine")
        _check_io(api, self._engine, io, where)
        self._context = self._loaded(self._engine.create_execution_context(), "makes no context for this engine")
        self._stream = self._cuda.stream()
        self._inputs = [self._buffer(spec) for spec in io.inputs]
        self._outputs = [self._buffer(spec) for spec in io.outputs]

    @property
    def provider(self) -> str:
        """What runs it, with the full version."""
        return f"{self._api.name} {self._api.version}"

    @property
    def threads(self) -> int:
        """Host threads inside one run."""
        return 1

    def run(self, feeds: Arrays) -> Sequence[Array]:
        """Run a batch: inputs (1, ...) by name to outputs (1, ...) in order.

        Raises:
            CudaError: A copy or the execution failed; the process must be restarted.
        """
        for buffer in self._inputs:
            np.copyto(buffer.host, feeds[buffer.name], casting="no")
            self._cuda.copy(buffer.device, buffer.host_address, buffer.host.nbytes, HOST_TO_DEVICE, self._stream)
        if not self._context.execute_async_v3(self._stream):
            raise CudaError(f"the engine did not run: {self._complaint()}", where=self._where)
        for buffer in self._outputs:
            self._cuda.copy(buffer.host_address, buffer.device, buffer.host.nbytes, DEVICE_TO_HOST, self._stream)
        self._cuda.wait(self._stream)
        return [buffer.host.copy() for buffer in self._outputs]

    def close(self) -> None:
        """Give buffers and stream back; the backend cannot run any more. A second call does nothing."""
        if self._context is None:
            return
        self._context = self._engine = None
        for buffer in (*self._inputs, *self._outputs):
            self._cuda.free(buffer.device)
            self._cuda.free_host(buffer.host_address)
        self._inputs, self._outputs = [], []
        self._cuda.destroy_stream(self._stream)

    def inspect(self) -> Any:
        """What the engine inspector says about every layer, parsed from its JSON."""
        inspector = self._engine.create_engine_inspector()
        text = inspector.get_engine_information(self._api.module.LayerInformationFormat.JSON)
        return json.loads(text)

    def _loaded(self, found: Any, what: str) -> Any:
        if found is None:  # TensorRT returns nothing and logs why; it raises no exception
            raise ModelFileError(f"TensorRT {self._api.version} {what}: {self._complaint()}", where=self._where,
                                 fix="Build it again on this machine with fmdeploy build")
        return found

    def _complaint(self) -> str:
        return "; ".join(complaints(self._log.messages, 3)) or "without a message"

    def _buffer(self, spec: TensorSpec) -> Buffer:
        shape, dtype = (1, *spec.shape), np.dtype(spec.dtype)
        size = math.prod(shape) * dtype.itemsize
        address, device = self._cuda.malloc_host(size), self._cuda.malloc(size)
        memory = (ctypes.c_uint8 * size).from_address(address)
        if not self._context.set_tensor_address(spec.name, device):
            raise ModelFileError(f"TensorRT {self._api.version} takes no address of {spec.name!r}: {self._complaint()}",
                                 where=self._where)
        return Buffer(spec.name, np.frombuffer(memoryview(memory), dtype).reshape(shape), address, device)


def _check_io(api: Api, engine: Any, io: IOSpec, where: object) -> None:
    """Compare names, directions, shapes and types with the specification."""
    trt = api.module
    found = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        mode = "input" if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "output"
        dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name
        found[name] = (mode, dtype, tuple(engine.get_tensor_shape(name)))
    wanted = {spec.name: ("input", spec.dtype, (1, *spec.shape)) for spec in io.inputs}
    wanted |= {spec.name: ("output", spec.dtype, (1, *spec.shape)) for spec in io.outputs}
    if found != wanted:
        raise ModelFileError("the engine's inputs and outputs are not those of io.json", where=where, expected=wanted,
                             found=found)
