"""ONNX Runtime behind the backend protocol: the provider that runs is asserted, never assumed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fmdeploy.arrays import Array, Arrays
from fmdeploy.errors import MissingError, ModelFileError
from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.optional import require

CPU = "CPUExecutionProvider"
ONNX_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "uint8": "tensor(uint8)",
    "int64": "tensor(int64)",
}


class OrtBackend:
    """One model in one ONNX Runtime session."""

    def __init__(
        self, model: bytes, io: IOSpec, *, provider: str = CPU, threads: int = 1, where: object = None
    ) -> None:
        """Load a model from bytes that were verified before.

        Args:
            model: A single-file ONNX model.
            io: What its inputs and outputs must be.
            provider: The execution provider that must run it, all of it.
            threads: Threads inside one run.
            where: Names the model in errors.

        Raises:
            MissingError: The provider is not available here, or onnxruntime is not installed.
            ModelFileError: onnxruntime refuses the model, or its inputs and outputs are not those of `io`.
        """
        ort = require("onnxruntime")
        if provider not in ort.get_available_providers():
            raise MissingError("this onnxruntime does not have the execution provider", where=where, expected=provider,
                               found=", ".join(ort.get_available_providers()))
        self._session = _session(ort, model, provider, threads, where)
        self._provider, self._threads = provider, threads
        _check_io(self._session, io, where)
        self._output_names = [spec.name for spec in io.outputs]

    @property
    def provider(self) -> str:
        """The execution provider that runs the model."""
        return self._provider

    @property
    def threads(self) -> int:
        """Threads inside one run."""
        return self._threads

    @property
    def session(self) -> Any:
        """The bare onnxruntime session, for benchmarks that compare with it."""
        return self._session

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs, in order."""
        return self._output_names

    def run(self, feeds: Arrays) -> Sequence[Array]:
        """Run a batch: inputs (1, ...) by name to outputs (1, ...) in order."""
        outputs: Sequence[Array] = self._session.run(self._output_names, feeds)
        return outputs


def _session(ort: Any, model: bytes, provider: str, threads: int, where: object) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    if provider != CPU:
        # Without this a missing kernel moves nodes to the CPU with nothing but a log line.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = ort.InferenceSession(model, options, providers=[provider])
    except Exception as error:  # onnxruntime's own exception classes are private and differ between versions
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelFileError(f"onnxruntime refuses the model: {text}", where=where) from error
    if session.get_providers()[0] != provider:
        raise MissingError("onnxruntime chose another execution provider", where=where, expected=provider,
                           found=session.get_providers()[0])
    return session


def _check_io(session: Any, io: IOSpec, where: object) -> None:
    pairs = (("inputs", io.inputs, session.get_inputs()), ("outputs", io.outputs, session.get_outputs()))
    for what, specs, found in pairs:
        names = [spec.name for spec in specs]
        if [arg.name for arg in found] != names:
            raise ModelFileError(f"the model's {what} are not those of io.json", where=where, expected=names,
                                 found=[arg.name for arg in found])
        for spec, arg in zip(specs, found, strict=True):
            _check_tensor(spec, arg, where)


def _check_tensor(spec: TensorSpec, arg: Any, where: object) -> None:
    # A symbolic axis is welcome (an exporter need not infer output shapes); the self-test checks the real ones.
    wanted = (1, *spec.shape)
    fits = len(arg.shape) == len(wanted) and all(
        found == size or not isinstance(found, int) for found, size in zip(arg.shape, wanted, strict=False)
    )
    if arg.type != ONNX_TYPES[spec.dtype] or not fits:
        raise ModelFileError(f"tensor {spec.name!r} of the model does not fit io.json", where=where,
                             expected=f"{ONNX_TYPES[spec.dtype]} {wanted}", found=f"{arg.type} {tuple(arg.shape)}")
