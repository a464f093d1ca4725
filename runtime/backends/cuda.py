"""The CUDA runtime calls that running an engine needs, through `cuda-bindings` or libcudart itself.

A CUDA fault is sticky: after one, every call of the process fails. Errors that leave the device usable (a capture that
cannot be made, memory that is not there) are told apart from those that lose it.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

from fmdeploy.errors import FmdeployError, MissingError
from fmdeploy.runtime.backends.protocol import DeviceLostError

NAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so")
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2  # cudaMemcpyKind
MAJOR, MINOR, MULTIPROCESSORS = 75, 76, 16  # cudaDeviceAttr: compute capability; how many multiprocessors
NO_DEVICE = (34, 35, 100)  # cudaErrorStubLibrary (a container without the driver), InsufficientDriver, NoDevice


# InvalidValue, MemoryAllocation, NotReady, NotPermitted, NotSupported, and all that a stream capture can complain of.
HARMLESS = frozenset({1, 2, 600, 800, 801, *range(900, 909)})
CAPTURE_THIS_THREAD = 1  # cudaStreamCaptureModeThreadLocal: calls of other threads do not break the capture
NON_BLOCKING = 1  # cudaStreamCreateWithFlags: not ordered against the default stream


class CudaError(FmdeployError):
    """A CUDA call failed; `code` is CUDA's number, 0 where it gave none."""

    def __init__(self, what: str, *, code: int = 0, **facts: Any) -> None:
        super().__init__(what, **facts)
        self.code = code


class CudaLostError(CudaError, DeviceLostError):
    """A CUDA call failed in a way that loses the device: the process cannot use the GPU any more."""


class Calls(Protocol):
    """How CUDA's functions are reached: by name, plain numbers in, one number (or nothing) out."""

    def call(self, name: str, *arguments: int, result: bool = False) -> tuple[int, int]:
        """Error code and result of `name`."""


class Library:
    """libcudart through ctypes: results come back through a pointer argument, the first one but for one function."""

    TRAILING = frozenset({"cudaStreamEndCapture"})

    def __init__(self, library: Any) -> None:
        self._library = library

    def call(self, name: str, *arguments: int, result: bool = False) -> tuple[int, int]:
        """Call a function; all arguments are passed in 64 bits."""
        slot = ctypes.c_void_p(0)
        values = [ctypes.c_void_p(value) for value in arguments]
        place = [ctypes.byref(slot)] if result else []
        given = [*values, *place] if name in self.TRAILING else [*place, *values]
        code = getattr(self._library, name)(*given)
        return int(code), int(slot.value or 0)


class Bindings:
    """`cuda.bindings.runtime`: results come back as a tuple behind the error code."""

    ENUMS: ClassVar = {
        "cudaMemcpyAsync": (3, "cudaMemcpyKind"),
        "cudaDeviceGetAttribute": (0, "cudaDeviceAttr"),
        "cudaStreamBeginCapture": (1, "cudaStreamCaptureMode"),
    }

    def __init__(self, module: Any) -> None:
        self._module = module

    def call(self, name: str, *arguments: int, result: bool = False) -> tuple[int, int]:
        """Call a function; enumerations are made from their numbers."""
        values: list[Any] = list(arguments)
        if name in self.ENUMS:
            position, enum = self.ENUMS[name]
            values[position] = getattr(self._module, enum)(values[position])
        code, *found = getattr(self._module, name)(*values)
        return int(code), int(found[0]) if result and not int(code) else 0


class Cuda:
    """The calls, with every error code looked at."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def _do(self, name: str, *arguments: int, result: bool = False) -> int:
        code, value = self._calls.call(name, *arguments, result=result)
        if code in HARMLESS:
            raise CudaError(f"{name} failed with CUDA error {code}", code=code)
        if code:
            raise CudaLostError(f"{name} failed with CUDA error {code}", code=code,
                                fix="Restart the process: the GPU is lost to it")
        return value

    def device_count(self) -> int:
        """Number of GPUs; 0 where there is no driver."""
        code, value = self._calls.call("cudaGetDeviceCount", result=True)
        if code in NO_DEVICE:
            return 0
        if code:
            raise CudaError(f"cudaGetDeviceCount failed with CUDA error {code}", code=code)
        return value

    def sm(self) -> str:
        """Compute capability of the first GPU, such as "87"."""
        return "".join(str(self._attribute(number)) for number in (MAJOR, MINOR))

    def multiprocessors(self) -> int:
        """How many multiprocessors the first GPU has: 16 on AGX Orin 64GB, 8 on Orin Nano 8GB, all of them sm_87."""
        return self._attribute(MULTIPROCESSORS)

    def _attribute(self, number: int) -> int:
        return self._do("cudaDeviceGetAttribute", number, 0, result=True)

    def malloc(self, size: int) -> int:
        """Device memory; returns its address."""
        return self._do("cudaMalloc", size, result=True)

    def malloc_host(self, size: int) -> int:
        """Page-locked host memory; returns its address."""
        return self._do("cudaMallocHost", size, result=True)

    def free(self, address: int) -> None:
        """Give device memory back."""
        self._do("cudaFree", address)

    def free_host(self, address: int) -> None:
        """Give page-locked memory back."""
        self._do("cudaFreeHost", address)

    def copy(self, target: int, source: int, size: int, kind: int, stream: int) -> None:
        """Copy `size` bytes, ordered on `stream`."""
        self._do("cudaMemcpyAsync", target, source, size, kind, stream)

    def stream(self) -> int:
        """A new stream that is not ordered against the default one."""
        return self._do("cudaStreamCreateWithFlags", NON_BLOCKING, result=True)

    def destroy_stream(self, stream: int) -> None:
        """Give a stream back."""
        self._do("cudaStreamDestroy", stream)

    def wait(self, stream: int) -> None:
        """Wait until everything on `stream` is done."""
        self._do("cudaStreamSynchronize", stream)

    def begin_capture(self, stream: int) -> None:
        """From here on, work given to `stream` is written down, not done."""
        self._do("cudaStreamBeginCapture", stream, CAPTURE_THIS_THREAD)

    def end_capture(self, stream: int) -> int:
        """Stop writing down; returns the graph."""
        return self._do("cudaStreamEndCapture", stream, result=True)

    def instantiate(self, graph: int) -> int:
        """Make a graph ready to be launched; returns what is launched. The graph itself can be destroyed then."""
        return self._do("cudaGraphInstantiateWithFlags", graph, 0, result=True)

    def launch(self, executable: int, stream: int) -> None:
        """Do everything that was written down, ordered on `stream`."""
        self._do("cudaGraphLaunch", executable, stream)

    def destroy_graph(self, graph: int) -> None:
        """Give a graph back."""
        self._do("cudaGraphDestroy", graph)

    def destroy_executable(self, executable: int) -> None:
        """Give what was launched back."""
        self._do("cudaGraphExecDestroy", executable)


def load_cuda(
    names: Sequence[str] = NAMES, *, load: Callable[[str], Any] = ctypes.CDLL,
    find_module: Callable[[str], Any] = importlib.import_module,
) -> Cuda:
    """Return the CUDA runtime of this machine, with at least one GPU behind it.

    Raises:
        MissingError: there is no CUDA runtime, or no GPU.
    """
    cuda = Cuda(_calls(names, load, find_module))
    if cuda.device_count() == 0:
        raise MissingError("there is no NVIDIA GPU here, or its driver is not loaded",
                           fix="Run this on the device; in a container start it with --runtime nvidia")
    return cuda


def _calls(names: Sequence[str], load: Callable[[str], Any], find_module: Callable[[str], Any]) -> Calls:
    try:
        return Bindings(find_module("cuda.bindings.runtime"))
    except ImportError:
        pass
    for name in names:
        try:
            return Library(load(name))
        except OSError:
            continue
    raise MissingError("there is no CUDA runtime here, so no GPU can be used", expected=f"{names[0]} or cuda-bindings",
                       fix="On Jetson it comes with JetPack; elsewhere: pip install cuda-bindings")
