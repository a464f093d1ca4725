"""What an ONNX file says about itself: versions, domains, and the parts of the format that no runtime here takes."""

from __future__ import annotations

import onnx
from onnx import ModelProto

from fmdeploy.errors import ModelFileError

DOMAINS = ("", "ai.onnx")
OLDEST_IR, OLDEST_OPSET = 3, 7  # IR 3 is ONNX 1.0; below opset 7 operators broadcast by other rules
NEWEST_IR, NEWEST_OPSET = int(onnx.IR_VERSION), onnx.defs.onnx_opset_version()


def opset_of(model: ModelProto) -> int:
    """Version of the default operator set; 0 where the model names none."""
    return max((entry.version for entry in model.opset_import if entry.domain in DOMAINS), default=0)


def shown(name: str) -> str:
    """A name from a foreign file as it may stand in one line: quoted, control characters escaped, cut."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


def check_header(model: ModelProto) -> None:
    """Check versions and domains.

    Raises:
        ModelFileError: the model is from the future or the distant past, or needs operators that are not ONNX's.
    """
    if not model.HasField("graph") or not model.graph.node:
        raise ModelFileError("holds no graph", fix="Export it again")
    if not OLDEST_IR <= model.ir_version <= NEWEST_IR:
        raise ModelFileError("has an IR version that onnx does not know", expected=f"{OLDEST_IR} to {NEWEST_IR}",
                             found=model.ir_version, fix="Update onnx, or export with an older IR version")
    versions = {entry.version for entry in model.opset_import if entry.domain in DOMAINS}
    if len(versions) != 1:
        raise ModelFileError("does not name one ONNX opset", found=sorted(versions), fix="Export it again")
    if not OLDEST_OPSET <= opset_of(model) <= NEWEST_OPSET:
        raise ModelFileError("has an opset that onnx does not know", expected=f"{OLDEST_OPSET} to {NEWEST_OPSET}",
                             found=opset_of(model), fix="Update onnx, or export with another opset")
    if model.functions:
        raise ModelFileError("defines functions of its own", where=f"function {shown(model.functions[0].name)}",
                             fix="Inline them: onnx.inliner.inline_local_functions")
    if model.training_info:
        raise ModelFileError("holds training information", fix="Export the model for inference")
    _check_domains(model)


def _check_domains(model: ModelProto) -> None:
    for node in model.graph.node:
        if node.domain not in DOMAINS:
            own = node.domain.startswith("com.microsoft")
            fix = ("It is ONNX Runtime's own: quantise with quant_format=QuantFormat.QDQ and 8-bit types, without "
                   "optimising first") if own else "Build the network from plain ONNX operators"
            raise ModelFileError(f"holds an operator of a foreign domain: {shown(f'{node.domain}.{node.op_type}')}",
                                 where=f"node {shown(node.name or ''.join(node.output[:1]))}", fix=fix)
