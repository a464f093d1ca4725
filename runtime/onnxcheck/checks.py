"""All static checks of one ONNX file, in the order in which they build on each other.

    bytes       every field known, nothing nested deeper than the format, bounded in number      wire.py, model.py
    structure   versions, one plain graph, allowed operators, data inside the file, names, order     structure.py
    numbers     stored bytes against shapes, sizes that fit memory, weights, scales              numbers.py, grids.py
    promises    inputs and outputs of io.json, static batch, declared INT8                       interface.py

ONNX Runtime sees the bytes only afterwards: versions of it follow paths out of the folder, die of a crafted location,
run a loop for ever, and compute with a scale of 0 or NaN without a word.
"""

from __future__ import annotations

from fmdeploy.errors import ModelFileError
from fmdeploy.iospec import IOSpec
from fmdeploy.likely import cause_of
from fmdeploy.runtime.onnxcheck import grids, interface, numbers, structure
from fmdeploy.runtime.onnxcheck.graphview import View
from fmdeploy.runtime.onnxcheck.interface import Declared
from fmdeploy.runtime.onnxcheck.model import Model, parse_model

RULES = (
    structure.check_versions, structure.check_plain, structure.check_operators, structure.check_embedded,
    structure.check_names, structure.check_order, numbers.check_stored, numbers.check_declared,
    numbers.check_weights, grids.check_grids,
)


# Marks by which a runtime takes the same bytes for a file of its own format, and then runs another network than this.
OTHER_FORMATS = {b"ORTM": "ONNX Runtime's own", b"TFL3": "TensorFlow Lite"}


def check_model(raw: bytes, io: IOSpec, *, where: object, declared: Declared | None = None) -> Model:
    """Check a file's bytes before any runtime parses them.

    Args:
        raw: The whole file.
        io: What its inputs and outputs must be.
        where: What to call it in messages.
        declared: What the bundle says about its INT8; default: nothing.

    Raises:
        ModelFileError: One line that names the file, the node or tensor, and what to do.
    """
    try:
        return _checked(raw, io, declared or Declared())
    except ModelFileError as error:
        place = str(where) if error.where is None else f"{where}, {error.where}"
        raise ModelFileError(error.what, where=place, expected=error.expected, found=error.found,
                             fix=error.fix) from error


def _checked(raw: bytes, io: IOSpec, declared: Declared) -> Model:
    if cause := cause_of(raw[:512]):
        raise ModelFileError(f"is not an ONNX model: {cause}", fix="Export or copy it again")
    if raw[4:8] in OTHER_FORMATS:
        raise ModelFileError(f"carries the mark of another format at byte 4: {OTHER_FORMATS[raw[4:8]]}",
                             expected="nothing but ONNX", fix="Export it again")
    model = parse_model(raw)
    view = View(model)
    if structure.is_empty(model.graph):
        raise ModelFileError("holds no network: it needs nodes, inputs and outputs", fix="Export it again")
    for rule in RULES:
        rule(view)
    interface.check_interface(view, io)
    interface.check_quantised(view, declared)
    return model


def remarks(model: Model) -> tuple[str, ...]:
    """What is odd about a model that passes, one line each; `export` and `check` say it."""
    stored, zero = numbers.weights_and_zeros(View(model))
    return tuple(f"{where} is a weight of nothing but zeros (1 of {stored}): that layer adds nothing" for where in zero)
