"""OpenVINO behind the backend protocol: the file for TensorRT, unchanged, on a CPU.

The device and the types that really run are read back from the compiled model, never assumed: OpenVINO would compute
in bfloat16 where the CPU can, and a quantised layer that it cannot fuse would quietly run in float.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.errors import MissingError, ModelFileError
from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.optional import require

DEVICE = "CPU"
COMPUTE = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
EIGHT_BITS = ("i8", "u8")


class OpenVinoBackend:
    """One model compiled for the CPU."""

    def __init__(
        self, model: bytes, io: IOSpec, *, threads: int = 1, int8: bool = True, where: object = None
    ) -> None:
        """Compile a model from bytes that were verified before.

        Args:
            model: A single-file ONNX model.
            io: What its inputs and outputs must be.
            threads: Threads inside one run.
            int8: Whether 8-bit layers are expected; without a single one the model is refused.
            where: Names the model in errors.

        Raises:
            MissingError: OpenVINO is not installed, or runs the model elsewhere or in another precision.
            ModelFileError: OpenVINO refuses the model, or its inputs and outputs are not those of `io`.
        """
        ov = require("openvino")
        self._version = str(ov.__version__).partition("-")[0]
        self._compiled = _compile(ov, model, threads, where)
        self._threads, self._where = threads, where
        _check_device(self._compiled, where)
        _check_io(self._compiled, io, where)
        self._eight, self._compute = _layers(self._compiled)
        if int8 and not self._eight:
            raise ModelFileError("OpenVINO runs no layer of it in 8 bits", where=where, expected="INT8 layers",
                                 found=f"{self._compute} layers in float")
        self._request = self._compiled.create_infer_request()
        self._outputs = [self._compiled.output(spec.name) for spec in io.outputs]

    @property
    def provider(self) -> str:
        """What runs it, with the version, the device and how many of its compute layers run in 8 bits."""
        return f"openvino {self._version} {DEVICE}, {self._eight} of {self._compute} layers in 8 bits"

    @property
    def threads(self) -> int:
        """Threads inside one run."""
        return self._threads

    def run(self, feeds: Arrays) -> Sequence[Array]:
        """Run a batch: inputs (1, ...) by name to outputs (1, ...) in order."""
        self._request.infer(feeds, share_inputs=True)
        return [self._request.get_tensor(output).data.copy() for output in self._outputs]

    def close(self) -> None:
        """Drop the compiled model; the backend cannot run any more."""
        self._request = self._compiled = None
        self._outputs = []


def _compile(ov: Any, model: bytes, threads: int, where: object) -> Any:
    # LATENCY and one stream: a frame is answered before the next one. Precision f32: no bfloat16 behind our back.
    options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
               "INFERENCE_PRECISION_HINT": "f32"}
    try:
        core = ov.Core()
        return core.compile_model(core.read_model(model), DEVICE, options)
    except Exception as error:  # RuntimeError and its own kinds, which differ between versions
        text = " ".join(str(error).split())[:160] or type(error).__name__
        raise ModelFileError(f"OpenVINO refuses the model: {text}", where=where) from error


def _check_device(compiled: Any, where: object) -> None:
    devices = list(compiled.get_property("EXECUTION_DEVICES"))
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_dtype()
    if devices != [DEVICE] or precision != np.float32:
        raise MissingError("OpenVINO would run the model elsewhere or in another precision", where=where,
                           expected=f"{DEVICE}, float32", found=f"{', '.join(devices)}, {np.dtype(precision).name}")


def _check_io(compiled: Any, io: IOSpec, where: object) -> None:
    for what, specs, ports in (("inputs", io.inputs, compiled.inputs), ("outputs", io.outputs, compiled.outputs)):
        found = {name: port for port in ports for name in port.get_names()}
        if len(ports) != len(specs) or any(spec.name not in found for spec in specs):
            raise ModelFileError(f"the model's {what} are not those of io.json", where=where,
                                 expected=[spec.name for spec in specs], found=sorted(found))
        for spec in specs:
            _check_tensor(spec, found[spec.name], where)


def _check_tensor(spec: TensorSpec, port: Any, where: object) -> None:
    wanted, dtype = (1, *spec.shape), np.dtype(port.get_element_type().to_dtype()).name
    shape = port.get_partial_shape()
    fits = shape.rank.is_static and len(shape) == len(wanted) and all(
        dim.is_dynamic or dim.get_length() == size for dim, size in zip(shape, wanted, strict=True))
    if dtype != spec.dtype or not fits:
        raise ModelFileError(f"tensor {spec.name!r} of the model does not fit io.json", where=where,
                             expected=f"{spec.dtype} {wanted}", found=f"{dtype} {shape}")


def _layers(compiled: Any) -> tuple[int, int]:
    """How many convolutions and matrix products run in 8 bits, and how many there are, as the device runs them."""
    found = []
    for op in compiled.get_runtime_model().get_ops():
        info = op.get_rt_info()
        if "layerType" in info and str(info["layerType"].astype(str)) in COMPUTE:
            found.append(str(info["runtimePrecision"].astype(str)).lower())
    return sum(precision in EIGHT_BITS for precision in found), len(found)
