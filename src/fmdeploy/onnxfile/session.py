"""ONNX Runtime on the CPU, as the stages that look at models use it: sessions and predictors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fmdeploy.arrays import Arrays
from fmdeploy.iospec import IOSpec
from fmdeploy.ortsession import ort_session


def cpu_session(model: bytes | Path, *, threads: int = 1, optimise: bool = True) -> Any:
    """Load a model into ONNX Runtime.

    Args:
        model: The file or its bytes.
        threads: Of one operator; operators run one after the other.
        optimise: False runs every node as it is written: the reference for what the file means.

    Raises:
        ModelFileError: ONNX Runtime refuses the model, or would not run it on the CPU.
    """
    where = model.name if isinstance(model, Path) else "model"
    return ort_session(model, threads=threads, optimise=optimise, where=where)


def run_model(model: bytes | Path, feeds: Arrays, *, optimise: bool = True) -> Arrays:
    """Run one batch through a model; outputs by name."""
    session = cpu_session(model, optimise=optimise)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def ort_predictor(
    model: bytes | Path, io: IOSpec, *, threads: int = 1, optimise: bool = True
) -> Callable[[Arrays], Arrays]:
    """Return a function from inputs (B, ...) to outputs (B, ...) that feeds a batch-1 model sample by sample."""
    session = cpu_session(model, threads=threads, optimise=optimise)
    names = [spec.name for spec in io.outputs]

    def predict(inputs: Arrays) -> Arrays:
        count = len(inputs[io.inputs[0].name])
        rows = [session.run(names, {n: np.ascontiguousarray(a[k : k + 1]) for n, a in inputs.items()})
                for k in range(count)]
        return {name: np.concatenate([row[i] for row in rows]) for i, name in enumerate(names)}

    return predict
