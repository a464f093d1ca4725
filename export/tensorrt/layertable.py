"""The builder's verbose "Layers:" message as rows. It is read completely, or not at all.

The text is no stable interface, so every field is matched in full: a log that has changed is `UnreadableLogError`, and
whoever asks for a verdict gets none. Written for TensorRT-RTX 1.7; the version is pinned in pyproject.toml.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fmdeploy.errors import InputError
from fmdeploy.export.tensorrt.builder import LAYERS, ONNX_NAME

ROW = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+)(?:, (?P<rest>.*))?")
SECTIONS = ("Inputs", "Constants", "Outputs")
SECTION = re.compile(r"(?P<title>Inputs|Constants|Outputs): \[(?P<body>(?: \{ .*? \},?)*)\](?:, |$)")
ITEM = re.compile(r" \{ (.*?) \}(?:,(?= \{)|$)")
TENSOR = re.compile(r"Name: (?P<name>.*?), Dimensions: \[(?P<dims>[-\d,]*)\], Strides: \[[-\d,]*\], "
                    r"StrideOrder: \[[-\d,]*\], Datatype: (?P<dtype>\w+), Format: (?P<format>.*)")
END = ("Bindings:", "I/O Tensors:", "IO Tensors:")
DTYPES = {"Float": "FP32", "Half": "FP16", "BFloat16": "BF16", "Int8": "INT8", "UInt8": "UINT8", "FP8": "FP8",
          "FP4": "FP4", "Int4": "INT4", "Int32": "INT32", "Int64": "INT64", "Bool": "BOOL"}


class UnreadableLogError(InputError):
    """The builder's table of layers is not what this version of fmdeploy can read."""


@dataclass(frozen=True)
class Operand:
    """One tensor of an engine layer."""

    name: str
    dims: tuple[int, ...]
    dtype: str

    @property
    def is_scalar(self) -> bool:
        """Whether it holds one number."""
        return all(size == 1 for size in self.dims)


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine, and the ONNX nodes it came from.

    Attributes:
        name: As the compiler calls it.
        kind: LayerType, such as "correlation", "gemm", "kgen".
        inputs: Tensors it reads.
        weights: Constants it holds: weights, but scales and scalars, too.
        outputs: Tensors it writes.
        nodes: Names of ONNX nodes.
    """

    name: str
    kind: str
    inputs: tuple[Operand, ...]
    weights: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    nodes: tuple[str, ...]


def read_layers(messages: Sequence[str]) -> tuple[EngineLayer, ...]:
    """Rows of every "Layers:" message of one build.

    Raises:
        UnreadableLogError: there is no such message, or a line of it cannot be read in full.
    """
    layers = tuple(layer for message in messages for layer in _rows(message))
    if not layers:
        raise UnreadableLogError("the builder's log holds no table of layers", found=f"{len(messages)} messages")
    return layers


def _rows(message: str) -> Iterator[EngineLayer]:
    lines = message.split("\n")  # not splitlines: names hold ASCII separators
    if lines[0].strip() != LAYERS:
        raise UnreadableLogError("is not a table of layers", found=lines[0][:80])
    for line in lines[1:]:
        if line.startswith(END):
            return
        if line.strip():
            yield read_layer(line)
    raise UnreadableLogError("the table of layers has no end", expected=" or ".join(END))


def read_layer(line: str) -> EngineLayer:
    """Read one line of the table.

    Raises:
        UnreadableLogError: a part of it is not understood.
    """
    row = ROW.fullmatch(line)
    if row is None:
        raise UnreadableLogError("a layer cannot be read", found=line[:120])
    head, _, meta = (row["rest"] or "").partition("Metadata: ")
    found = {match["title"]: match["body"] for match in SECTION.finditer(head)}
    if any(head.count(f"{title}: [") != (title in found) for title in SECTIONS):
        raise UnreadableLogError("a layer's tensors cannot be read", where=row["name"], found=head[:120])
    parts = {title: tuple(_operands(row["name"], found.get(title, ""))) for title in SECTIONS}
    if sum(map(len, parts.values())) != head.count("{ Name: "):
        raise UnreadableLogError("a layer has tensors outside its lists", where=row["name"], found=head[:120])
    return EngineLayer(row["name"], row["kind"], parts["Inputs"], parts["Constants"], parts["Outputs"],
                       tuple(ONNX_NAME.findall(meta)))


def _operands(layer: str, body: str) -> Iterator[Operand]:
    for text in ITEM.findall(body):
        tensor = TENSOR.fullmatch(text)
        if tensor is None or tensor["dtype"] not in DTYPES:
            raise UnreadableLogError("a tensor cannot be read", where=layer, found=text[:160])
        dims = tuple(int(size) for size in tensor["dims"].split(",") if size)
        yield Operand(tensor["name"], dims, DTYPES[tensor["dtype"]])
