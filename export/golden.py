"""Golden vectors: a few inputs and what every file answered here, for the device to prove itself on.

    golden.safetensors   input.<name>, target.<name>, output.<variant>.<name> (ONNX Runtime),
                         reference.<fp32|int8>.<name> (torch, float and fake-quantised), each (N, ...)
    golden.json          per variant: smallest SQNR allowed elsewhere; ids; this machine; layers that may saturate
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from fmdeploy.cpu import this_cpu
from fmdeploy.draft import Draft
from fmdeploy.errors import DataError
from fmdeploy.export.parity import Outputs, Predict, outputs_of
from fmdeploy.task import Samples, Task

# Another machine rounds other sums to another level; saturation or a broken kernel costs far more than this.
TOLERANCE_DB = {"fp32": 60.0, "fp16": 40.0, "int8": 25.0, "int8-cpu": 35.0}


def write_golden(
    draft: Draft, task: Task, samples: Samples, predictors: dict[str, Predict], *, references: dict[str, Predict],
    saturating: tuple[str, ...],
) -> None:
    """Run every variant on `samples` and write both files.

    Args:
        draft: Of a BUNDLE.
        task: Its metric is evaluated on the way.
        samples: The golden samples.
        predictors: Variant → the file, run the way that defines it.
        references: "fp32" and "int8" → the torch module that the files were made from.
        saturating: Layers of `int8-cpu` that may saturate on x86 without VNNI.

    Raises:
        DataError: a variant answers with NaN or infinity.
    """
    inputs, targets = samples.batch(np.arange(len(samples)))
    tensors = {f"input.{name}": array for name, array in inputs.items()}
    tensors |= {f"target.{name}": np.asarray(array) for name, array in targets.items()}
    variants: dict[str, Any] = {}
    for variant, predict in predictors.items():
        outputs = outputs_of(predict, samples, task)
        _require_finite(variant, outputs)
        tensors |= {f"output.{variant}.{name}": array for name, array in outputs.arrays.items()}
        variants[variant] = {"sqnr_db": TOLERANCE_DB[variant]}
    for name, predict in references.items():
        tensors |= {f"reference.{name}.{key}": array for key, array in predict(inputs).items()}
    draft.write_tensors("golden.safetensors", tensors)
    draft.write_json("golden.json", {
        "variants": variants, "samples": list(samples.ids),
        "made_on": asdict(this_cpu()), "saturates_without_vnni": list(saturating),
    })


def _require_finite(variant: str, outputs: Outputs) -> None:
    for name, array in outputs.arrays.items():
        if not np.isfinite(array).all():
            raise DataError(f"model.{variant}.onnx answers with NaN or infinity", where=f"output {name!r}")
