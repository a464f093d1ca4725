"""The TensorRT files of a bundle before a real TensorRT compiler: `tensorrt.json`.

    api, version     who compiled
    proves, not      what a pass means, and what not
    files            variant → every engine layer with its types and ONNX nodes, and every conv and matrix product
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx

from fmdeploy.export.formats import file_name
from fmdeploy.export.placed import placed_nodes
from fmdeploy.export.tensorrt.compilecheck import (
    API,
    NOT_PROVEN,
    PROVES,
    CompileReport,
    compile_check,
    require_passed,
)
from fmdeploy.export.variants import QDQ, TYPED, Variants
from fmdeploy.progress import say

FILE = "tensorrt.json"


def verify_tensorrt(variants: Variants, placed: Sequence[str]) -> dict[str, Any]:
    """Compile every file that is for TensorRT.

    Args:
        variants: the files.
        placed: names of conv and linear modules that the placement quantises: all of them must run in INT8.

    Returns:
        What `tensorrt.json` holds.

    Raises:
        GateError: a file does not compile, or a placed layer is not INT8 in its engine.
    """
    required = placed_nodes(onnx.load(str(variants.path(QDQ))), placed) if "int8" in variants.names else ()
    reports: dict[str, CompileReport] = {}
    for variant in (name for name in TYPED if name in variants.names):
        report = compile_check(variants.path(variant), require_int8=required if variant == "int8" else (), api=API)
        say(f"{file_name(variant)}: {report}")
        require_passed(report, file_name(variant))
        reports[variant] = report
    return {"api": API, "version": next(iter(reports.values())).version, "proves": PROVES, "not_proven": NOT_PROVEN,
            "required_int8": list(required), "files": {name: report.to_json() for name, report in reports.items()}}
