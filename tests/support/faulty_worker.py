"""A worker whose backend fails where a frame says so: `python faulty_worker.py FOLDER MEMORY SOCKET LIFELINE`.

The first value of the lidar names the fault (`FAULTS`); every other frame runs as usual. A file `crash` in FOLDER kills
the worker while it loads, `loop.onnx` and `matmul.onnx` are what its names say.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and os.path.exists(os.path.join(sys.argv[1], "crash")):
    os.abort()  # before the imports, which take most of a start

import ctypes
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.runtime.backends.onnxrt import OrtBackend
from fmdeploy.runtime.backends.protocol import Backend, DeviceLostError
from fmdeploy.runtime.bundle import Bundle
from fmdeploy.runtime.inference import Inference
from fmdeploy.runtime.supervisor.notes import Setup
from fmdeploy.runtime.supervisor.worker import main, make_inference

FAULTS = ("abort", "segv", "c_sleep", "loop", "matmul", "raise", "huge", "nan", "device", "slow", "leak", "stop", "exit")
BASE, STEP = 0.25, 0.0078125  # exact in float32
ONE = IOSpec(inputs=(TensorSpec(name="x", shape=(1,)),), outputs=(TensorSpec(name="y", shape=(1,)),), preprocessing="none")


def poison(frame: Arrays, fault: str) -> Arrays:
    """Mark a frame: whoever runs it has that fault."""
    frame["lidar"][0, 0, 0] = BASE + STEP * FAULTS.index(fault)
    return frame


class FaultyBackend:
    """A backend that does what the frame says."""

    def __init__(self, inner: Backend, folder: Path) -> None:
        self.inner, self.folder = inner, folder
        self.others: list[OrtBackend] = []
        self.leaked: list[bytearray] = []
        self.broken = False

    @property
    def provider(self) -> str:
        return self.inner.provider

    @property
    def threads(self) -> int:
        return self.inner.threads

    def run(self, feeds: Arrays) -> Sequence[Array]:
        if self.broken:
            raise RuntimeError("an illegal memory access was encountered")
        at = (float(feeds["lidar"].flat[0]) - BASE) / STEP
        if at in range(len(FAULTS)):
            todo: Callable[[], None] = getattr(self, f"_{FAULTS[int(at)]}")
            todo()
        outputs = self.inner.run(feeds)
        if at == FAULTS.index("nan"):
            outputs[0].flat[7] = np.nan
        return outputs

    def terminate(self) -> None:
        for backend in self.others:
            backend.terminate()

    def _abort(self) -> None:
        os.abort()

    def _segv(self) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def _exit(self) -> None:
        os._exit(7)

    def _c_sleep(self) -> None:
        ctypes.PyDLL(None).sleep(60)  # a C call that keeps the interpreter: nothing in this process runs meanwhile

    def _stop(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def _loop(self) -> None:
        self._onnx("loop.onnx")

    def _matmul(self) -> None:
        self._onnx("matmul.onnx")

    def _huge(self) -> None:
        self._onnx("huge.onnx")

    def _onnx(self, name: str) -> None:
        backend = OrtBackend((self.folder / name).read_bytes(), ONE)
        self.others.append(backend)
        backend.run({"x": np.ones((1, 1), np.float32)})

    def _raise(self) -> None:
        raise RuntimeError("injected")

    def _device(self) -> None:
        self.broken = True
        raise DeviceLostError("an illegal memory access was encountered")

    def _nan(self) -> None:
        pass

    def _slow(self) -> None:
        time.sleep(0.15)

    def _leak(self) -> None:
        self.leaked.append(bytearray(os.urandom(1 << 20) * 24))


def faulty(folder: Path) -> Callable[[Setup, Bundle], Inference]:
    def make(setup: Setup, bundle: Bundle) -> Inference:
        inference = make_inference(setup, bundle)
        running = inference.running
        backend = FaultyBackend(running.backend, folder)
        inference._now = running._replace(backend=backend)
        inference._loaded[running.tier] = backend
        return inference

    return make


__all__ = ["FAULTS", "faulty", "poison"]

if __name__ == "__main__":
    main(sys.argv[2:], faulty(Path(sys.argv[1])))
