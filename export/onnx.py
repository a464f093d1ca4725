"""ONNX files from torch modules: float, and INT8 in the TensorRT dialect; simplified, checked, byte-deterministic.

Both go through the TorchScript exporter, the only one that modelopt's Q/DQ export works with. Batch is 1 and static:
TensorRT then needs no optimisation profile.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto
from torch import Tensor, nn

from fmdeploy.errors import ConfigError, ModelFileError
from fmdeploy.export.formats import IR_VERSION, OPSET
from fmdeploy.export.lint.allowed import require_allowed
from fmdeploy.iospec import IOSpec
from fmdeploy.models.outputs import example_inputs
from fmdeploy.onnxfile.graph import DQ, Graph, Q, attribute, op_counts, save_model
from fmdeploy.onnxfile.reading import read_model
from fmdeploy.onnxfile.session import run_model
from fmdeploy.onnxfile.tidy import constants_to_initialisers, drop_identities
from fmdeploy.optional import require
from fmdeploy.quantize import modelopt

KEPT = (Q, DQ, "LayerNormalization", "Gelu", "Conv", "ConvTranspose")  # what simplification must not lose or add
SIMPLIFIED = 1e-4  # largest difference, relative to the largest output, that simplification may cause


def export_onnx(module: nn.Module, io: IOSpec, path: Path, *, opset: int = OPSET) -> ModelProto:
    """Write `module` to `path` as one file with static batch 1 and the names of `io`.

    Args:
        module: a traced float graph with BatchNorm folded, or a calibrated quantised module. Positional tensors in,
            tensors out, in the order of `io`.
        io: names and shapes of inputs and outputs.
        path: the file to write.
        opset: ONNX operator set, 17 to 20.

    Raises:
        ConfigError: `opset` is outside what modelopt exports.
        ModelFileError: the module exports to operators outside the allowlist, or simplifying changed its results.
    """
    if opset not in modelopt.OPSETS:
        raise ConfigError("unsupported opset", expected=f"{modelopt.OPSETS[0]} to {modelopt.OPSETS[-1]}", found=opset)
    example = example_inputs(io)
    raw = _export(module, example, io, opset)
    before = raw.SerializeToString()
    _tidy(raw)  # before simplifying, which merges equal nodes itself: their number must not change there
    model = _simplify(raw)
    graph = _tidy(model)
    _stamp(model)
    require_one_pair_a_tensor(graph)
    require_allowed(model, where=path)
    _require_io(model, io, path)
    save_model(model, path)
    _require_same(before, path, io)
    return model


def _export(module: nn.Module, example: tuple[Tensor, ...], io: IOSpec, opset: int) -> ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "raw.onnx"
        inputs, outputs = [s.name for s in io.inputs], [s.name for s in io.outputs]
        try:
            modelopt.onnx_export(module.eval(), example, str(path), opset_version=opset, input_names=inputs,
                                 output_names=outputs)
        except Exception as error:  # torch.onnx raises UnsupportedOperatorError and many others
            reason = str(error).strip().splitlines()[0][:160]
            raise ModelFileError(f"cannot be exported to ONNX: {reason}", where=type(module).__name__) from error
        return read_model(path)


def _simplify(raw: ModelProto) -> ModelProto:
    simplified, agrees = require("onnxsim").simplify(raw)
    before, after = op_counts(raw), op_counts(simplified)
    lost = [op for op in KEPT if before[op] != after[op]]
    if not agrees or lost:
        raise ModelFileError(f"simplifying changed the number of {lost[0] if lost else 'results'}",
                             expected=before[lost[0]] if lost else None, found=after[lost[0]] if lost else None)
    checked: ModelProto = simplified
    return checked


def _tidy(model: ModelProto) -> Graph:
    graph = Graph(model)
    constants_to_initialisers(graph)
    drop_identities(graph)  # modelopt leaves casts of a type to itself: they hide that two tensors are one
    _merge_pairs(graph)
    graph.drop_unused()
    return graph


def _merge_pairs(graph: Graph) -> None:
    """Keep one Q and one DQ per tensor and scale: duplicates, one a reader, would stop ONNX Runtime's fusion."""
    for op_type in (Q, DQ):
        first: dict[tuple[object, ...], NodeProto] = {}
        gone = []
        for node in graph.nodes(op_type):
            parameters = tuple(graph.constants[name].tobytes() for name in node.input[1:])
            kept = first.setdefault((node.input[0], *parameters, attribute(node, "axis")), node)
            if kept is not node:
                graph.redirect(node.output[0], kept.output[0])
                gone.append(node)
        graph.remove(gone)


def _stamp(model: ModelProto) -> None:
    """Set what identifies the format, and drop what varies with the machine (source paths in doc strings)."""
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version, model.doc_string = "fmdeploy", "", ""
    model.graph.name, model.graph.doc_string = "student", ""
    del model.metadata_props[:]
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]


def require_one_pair_a_tensor(graph: Graph) -> None:
    """Check that a quantised tensor has one Q, that Q one DQ, and that nobody else reads the Q.

    Raises:
        ModelFileError: names the tensor.
    """
    pairs: dict[str, list[str]] = defaultdict(list)
    for node in graph.nodes(Q):
        pairs[node.input[0]].append(node.name)
        readers = graph.readers[node.output[0]]
        if [reader.op_type for reader in readers] != [DQ]:
            raise ModelFileError("a quantised tensor has other readers than one DequantizeLinear", where=node.name,
                                 found=[reader.op_type for reader in readers])
    for tensor, names in pairs.items():
        if len(names) > 1:
            raise ModelFileError("a tensor is quantised twice", where=tensor, expected=1, found=len(names))


def _require_io(model: ModelProto, io: IOSpec, path: Path) -> None:
    for specs, values in ((io.inputs, model.graph.input), (io.outputs, model.graph.output)):
        expected = [(spec.name, (1, *spec.shape)) for spec in specs]
        found = [(v.name, tuple(d.dim_value for d in v.type.tensor_type.shape.dim)) for v in values]
        if expected != found:
            raise ModelFileError("does not have the inputs and outputs of the task", where=path.name,
                                 expected=expected, found=found)


def _require_same(raw: bytes, path: Path, io: IOSpec) -> None:
    """Run the exported and the finished file on the same noise and compare."""
    generator = np.random.default_rng(0)
    feeds = {spec.name: _noise(generator, (1, *spec.shape), spec.value_range).astype(spec.dtype) for spec in io.inputs}
    before, after = run_model(raw, feeds), run_model(path.read_bytes(), feeds)
    for name, expected in before.items():
        error = float(np.abs(expected - after[name]).max()) / max(float(np.abs(expected).max()), 1e-12)
        if not error <= SIMPLIFIED:
            raise ModelFileError("simplifying changed the results", where=f"{path.name}, output {name}",
                                 expected=f"relative difference <= {SIMPLIFIED}", found=f"{error:.3g}")


def _noise(
    generator: np.random.Generator, shape: tuple[int, ...], limits: tuple[float, float] | None
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    low, high = limits or (-1.0, 1.0)
    return generator.uniform(low, high, shape)
