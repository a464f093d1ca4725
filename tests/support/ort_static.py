"""The calibration samples of ONNX Runtime's `quantize_static`, for the files of that tool in tests and benchmarks."""

from __future__ import annotations

from typing import Any

from fmdeploy.arrays import Arrays


def samples_reader(inputs: Arrays) -> Any:
    """A CalibrationDataReader that gives the samples of `inputs` (N, ...) one by one."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            count = len(next(iter(inputs.values())))
            self.rows = iter([{name: array[k : k + 1] for name, array in inputs.items()} for k in range(count)])

        def get_next(self) -> Arrays | None:
            return next(self.rows, None)

    return Reader()
