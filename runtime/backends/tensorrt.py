"""A TensorRT engine behind the backend protocol: name-based I/O, `execute_async_v3`, nothing that a release removed.

One run is copies in, the engine, copies out, all on one stream. Shapes and addresses never change, so this work is
written down once as a CUDA graph and launched in one call; where that fails the calls are made one by one, and
`provider` says so.

Not run yet: any of it on a GPU. Loading and its refusals have run with the library of TensorRT-RTX 1.7, the calls of
the CUDA runtime with libcudart 12.9 and cuda-bindings 12.9 up to "no driver".
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.errors import MissingError, ModelFileError
from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.runtime.backends.cuda import DEVICE_TO_HOST, HOST_TO_DEVICE, Cuda, CudaError, load_cuda
from fmdeploy.runtime.backends.cudagraph import capture
from fmdeploy.runtime.backends.planfault import PlanError, check_length, fault_of
from fmdeploy.runtime.backends.protocol import DeviceLostError
from fmdeploy.runtime.backends.tensorrt_api import ERRORS, Api, capturing_logger, complaints, error_recorder, one_line
from fmdeploy.runtime.backends.tensorrt_engine import check_engine, device_memory_bytes

MIB = 2**20


@dataclass(frozen=True)
class Buffer:
    """One input or output: page-locked host memory seen as an array, and its place on the device."""

    name: str
    host: Array
    host_address: int
    device: int


class TensorRtBackend:
    """One engine in one execution context, with its own stream and buffers."""

    def __init__(
        self, engine: bytes, io: IOSpec, *, api: Api, cuda: Cuda | None = None, where: object = None, graph: bool = True
    ) -> None:
        """Load an engine that was built on this machine.

        Args:
            engine: The serialised engine; its bytes were verified before, since an engine is code.
            io: What its inputs and outputs must be.
            api: TensorRT.
            cuda: The CUDA runtime; default: this machine's.
            where: Names the engine in errors.
            graph: Whether to launch runs as a CUDA graph.

        Raises:
            MissingError: There is no GPU here.
            PlanError: TensorRT does not load it; the code says why, its log is in the text.
            ModelFileError: Its inputs and outputs are not those of `io`.
        """
        check_length(engine, where)
        self._cuda = load_cuda() if cuda is None else cuda
        self._api, self._where = api, where
        self._log, self._errors = capturing_logger(api, ERRORS), error_recorder(api)
        self._runtime = self._new_runtime()
        self._engine = self._deserialize(engine)
        check_engine(api, self._engine, io, where)
        self._context: Any = self._loaded(self._engine.create_execution_context(), "makes no context for this engine")
        self._inputs: list[Buffer] = []
        self._outputs: list[Buffer] = []
        self._executable, self._without_graph = 0, "" if graph else "not asked for"
        self._stream = self._cuda.stream()
        try:
            self._start(io, graph)
        except Exception:  # another tier may take over in this process, and needs the memory
            with suppress(CudaError):
                self.close()
            raise

    @property
    def provider(self) -> str:
        """What runs it, with the full version."""
        return f"{self._api.name} {self._api.version}{' without CUDA graph' if self._without_graph else ''}"

    @property
    def without_graph(self) -> str:
        """Why runs are not launched as a CUDA graph; empty where they are."""
        return self._without_graph

    @property
    def threads(self) -> int:
        """Host threads inside one run."""
        return 1

    @property
    def device_memory_mib(self) -> float | None:
        """What the engine's scratch memory takes on the device; None where this TensorRT does not say."""
        size = device_memory_bytes(self._engine)
        return None if size is None else size / MIB

    def run(self, feeds: Arrays) -> Sequence[Array]:
        """Run a batch: inputs (1, ...) by name to outputs (1, ...) in order.

        Raises:
            CudaLostError: The device is lost to this process.
            CudaError: A copy or the execution failed.
        """
        for buffer in self._inputs:
            np.copyto(buffer.host, feeds[buffer.name], casting="no")
        if self._executable:
            self._cuda.launch(self._executable, self._stream)
        else:
            self._enqueue()
        self._cuda.wait(self._stream)
        if self._errors.errors:  # what TensorRT noticed while it worked; the return value was given before
            raise CudaError(f"the engine did not run well: {self._complaint()}", where=self._where)
        return [buffer.host.copy() for buffer in self._outputs]

    def close(self) -> None:
        """Give graph, buffers and stream back; the backend cannot run any more. A second call does nothing."""
        if self._context is None:
            return
        if self._executable:
            self._cuda.destroy_executable(self._executable)
        self._executable, self._context, self._engine = 0, None, None
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

    def _new_runtime(self) -> Any:
        try:
            runtime = self._api.module.Runtime(self._log)
        except Exception as error:  # the bindings turn a null pointer into a TypeError or RuntimeError of their own
            raise MissingError(f"TensorRT {self._api.version} does not start: {one_line(str(error))}",
                               where=self._where) from error
        runtime.engine_host_code_allowed = False  # the default, said aloud: a plan must not bring code for the host
        runtime.error_recorder = self._errors
        return runtime

    def _deserialize(self, engine: bytes) -> Any:
        found = self._runtime.deserialize_cuda_engine(engine)
        if found is None:  # TensorRT returns nothing and says why; it raises no exception
            said = self._complaint()
            raise PlanError(fault_of(said), f"TensorRT {self._api.version} does not load this engine: {said}",
                            where=self._where)
        return found

    def _loaded(self, found: Any, what: str) -> Any:
        if found is None:
            raise ModelFileError(f"TensorRT {self._api.version} {what}: {self._complaint()}", where=self._where,
                                 fix="Build it again on this machine with fmdeploy build")
        return found

    def _complaint(self) -> str:
        """What TensorRT said since the last question, each thing once, in one line."""
        recorded = [("ERROR", text) for _, text in self._errors.errors]
        found = "; ".join(complaints([*self._log.messages, *recorded], 3)) or "without a message"
        self._errors.clear()
        self._log.messages.clear()
        return found

    def _buffer(self, spec: TensorSpec, buffers: list[Buffer]) -> None:
        shape, dtype = (1, *spec.shape), np.dtype(spec.dtype)
        size = math.prod(shape) * dtype.itemsize
        address, device = self._cuda.malloc_host(size), self._cuda.malloc(size)
        memory = (ctypes.c_uint8 * size).from_address(address)
        host = np.frombuffer(memoryview(memory), dtype).reshape(shape)
        host[...] = 0  # the first run happens before the first frame
        buffers.append(Buffer(spec.name, host, address, device))
        if not self._context.set_tensor_address(spec.name, device):
            raise ModelFileError(f"TensorRT {self._api.version} takes no address of {spec.name!r}: {self._complaint()}",
                                 where=self._where)

    def _start(self, io: IOSpec, graph: bool) -> None:
        """Run once as it is (TensorRT allocates on its first run), then write the work down."""
        for specs, buffers in ((io.inputs, self._inputs), (io.outputs, self._outputs)):
            for spec in specs:
                self._buffer(spec, buffers)
        self._enqueue()
        self._cuda.wait(self._stream)
        if not graph:
            return
        try:
            self._executable = capture(self._cuda, self._stream, self._enqueue)
        except DeviceLostError:
            raise
        except CudaError as error:
            self._without_graph = str(error)
            self._errors.clear()

    def _enqueue(self) -> None:
        """Give one run to the stream."""
        for buffer in self._inputs:
            self._cuda.copy(buffer.device, buffer.host_address, buffer.host.nbytes, HOST_TO_DEVICE, self._stream)
        if not self._context.execute_async_v3(self._stream):
            raise CudaError(f"the engine did not run: {self._complaint()}", where=self._where)
        for buffer in self._outputs:
            self._cuda.copy(buffer.host_address, buffer.device, buffer.host.nbytes, DEVICE_TO_HOST, self._stream)
