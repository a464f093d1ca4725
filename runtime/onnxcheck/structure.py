"""Rules on what a file is made of: versions, operators, names, order, and no data from outside."""

from __future__ import annotations

from collections import Counter

from fmdeploy.errors import ModelFileError
from fmdeploy.runtime.onnxcheck.graphview import View, refuse, tensors_of
from fmdeploy.runtime.onnxcheck.model import Graph
from fmdeploy.runtime.onnxcheck.operators import ALLOWED, CONTROL_FLOW, DOMAINS, IR_VERSIONS, OPSETS
from fmdeploy.runtime.onnxcheck.tensors import shown

AGAIN = "Export it again"
CONSTANTS = frozenset(("value", "value_float", "value_floats", "value_int", "value_ints"))


def check_versions(view: View) -> None:
    """Row M15: the file format and the operator set are among those that every runtime here knows.

    Raises:
        ModelFileError: They are from the future or the distant past.
    """
    model = view.model
    oldest, newest = IR_VERSIONS
    if not oldest <= model.ir_version <= newest:
        raise ModelFileError("has an IR version that no runtime here knows", expected=f"{oldest} to {newest}",
                             found=model.ir_version, fix="Export with an older IR version")
    versions = {version for domain, version in model.opsets if domain in DOMAINS}
    if len(versions) != 1:
        raise ModelFileError("does not name one ONNX opset", found=sorted(versions), fix=AGAIN)
    oldest, newest = OPSETS
    if not oldest <= model.opset <= newest:
        raise ModelFileError("has an opset that no runtime here knows", expected=f"{oldest} to {newest}",
                             found=model.opset, fix="Export with another opset")


def check_plain(view: View) -> None:
    """The file is one graph: no functions, no training, no placement on several devices, no sparse weights.

    Raises:
        ModelFileError: It holds one of them.
    """
    model = view.model
    parts = {"functions of its own": model.num_functions, "training information": model.num_training,
             "a placement on several devices": model.num_configurations, "sparse weights": model.graph.has_sparse}
    for what, there in parts.items():
        if there:
            raise ModelFileError(f"holds {what}", fix="Export the model for inference, from plain ONNX operators")


def check_operators(view: View) -> None:
    """Rows M14 and M17: only known operators of ONNX's own domain, and no control flow.

    Raises:
        ModelFileError: Names the node.
    """
    for node in view.graph.nodes:
        if node.op_type in CONTROL_FLOW or node.foreign == "a graph inside":
            raise refuse(node, "is control flow, whose time and memory nothing bounds",
                         fix="Export with the branch or the number of steps fixed")
        if node.domain not in DOMAINS:
            raise refuse(node, f"is an operator of a foreign domain: {shown(node.domain)}",
                         fix="Build the network from plain ONNX operators")
        if node.op_type not in ALLOWED:
            raise refuse(node, "is not an operator that may run on the device",
                         fix="Replace it in the network; runtime/onnxcheck/operators.py lists them")
        if node.foreign:
            raise refuse(node, f"holds {node.foreign}", fix=AGAIN)
        if node.op_type == "Constant" and (len(node.attributes) != 1 or not node.attributes.keys() <= CONSTANTS):
            raise refuse(node, "must hold one number, list or tensor", found=", ".join(map(shown, node.attributes)),
                         fix=AGAIN)  # ONNX Runtime takes the first attribute, whatever the others are


def check_embedded(view: View) -> None:
    """Rows M7 to M11: no tensor anywhere names data outside the file, whatever its location says.

    Raises:
        ModelFileError: Names the tensor.
    """
    for tensor in tensors_of(view.graph):
        if tensor.external:
            raise ModelFileError("refers to data outside the file", where=tensor.where,
                                 fix="Export it as a single file: onnx.save(onnx.load(path), new_path)")


def check_names(view: View) -> None:
    """Row M16: every tensor is defined once, every node and every output has a name of its own.

    Raises:
        ModelFileError: Names the first that repeats.
    """
    graph = view.graph
    stored = [tensor.name for tensor in graph.initializers]
    made = [name for node in graph.nodes for name in node.outputs if name]
    _once([*(value.name for value in graph.inputs), *stored, *made], "defines a tensor twice, or one without a name",
          "tensor")
    _once([value.name for value in graph.outputs], "names one tensor as output twice", "tensor")
    _once([node.name for node in graph.nodes if node.name], "has two nodes of one name", "node")
    for node in graph.nodes:
        if not any(node.outputs):
            raise refuse(node, "makes nothing", fix=AGAIN)


def _once(names: list[str], what: str, kind: str) -> None:
    twice = next((name for name, count in Counter(names).items() if count > 1 or not name), None)
    if twice is not None:
        raise ModelFileError(what, where=f"{kind} {shown(twice)}", fix=AGAIN)


def check_order(view: View) -> None:
    """Row M16: nodes stand in an order in which they can run; nothing is read that nothing makes.

    Raises:
        ModelFileError: Names the node, and says whether it waits for itself.
    """
    graph = view.graph
    known = {value.name for value in graph.inputs} | {tensor.name for tensor in graph.initializers} | {""}
    for node in graph.nodes:
        for name in node.inputs:
            if name not in known:
                raise refuse(node, _why_unknown(name, view), fix=AGAIN)
        known.update(node.outputs)
    for value in graph.outputs:
        if value.name not in known:
            raise ModelFileError("has an output that no node makes", where=f"tensor {shown(value.name)}", fix=AGAIN)


def _why_unknown(name: str, view: View) -> str:
    if name not in view.makers:
        return f"reads the tensor {shown(name)}, which nothing defines"
    if _waits_for_itself(name, view):
        return f"has a cycle: it waits for its own result through {shown(name)}"
    return f"reads the tensor {shown(name)} before it is made"


def _waits_for_itself(name: str, view: View) -> bool:
    """Whether `name` is needed to make `name`; a plain walk, no recursion."""
    seen: set[str] = set()
    waiting = list(view.makers[name].inputs)
    while waiting:
        one = waiting.pop()
        if one == name:
            return True
        if one not in seen and one in view.makers:
            seen.add(one)
            waiting += view.makers[one].inputs
    return False


def is_empty(graph: Graph) -> bool:
    """Whether there is nothing to run."""
    return not graph.nodes or not graph.inputs or not graph.outputs
