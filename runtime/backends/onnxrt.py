"""ONNX Runtime behind the backend protocol: the provider that runs is asserted, never assumed.

The session options that promise a smaller or faster start change nothing on a model with a fixed batch of one: with and
without the arena, memory patterns or the device allocator for weights, the demo's files load in the same time, run in
the same time and peak within 1 MiB of each other (5 fresh processes each, with a control). So they stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fmdeploy.arrays import Array, Arrays
from fmdeploy.errors import ModelFileError
from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.optional import require
from fmdeploy.ortsession import CPU, ort_session

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
        self._session = ort_session(model, provider=provider, threads=threads, where=where)
        self._provider, self._threads = provider, threads
        self._options = require("onnxruntime").RunOptions()
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
        self._options.terminate = False
        outputs: Sequence[Array] = self._session.run(self._output_names, feeds, self._options)
        return outputs

    def terminate(self) -> None:
        """Ask, from another thread, that the run in progress ends: it does at its next node, by raising."""
        self._options.terminate = True


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
