"""Rules for ONNX Runtime's CPU kernels: which spelling of 8 bits is fast there."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import TensorProto

from fmdeploy.export.isa import saturating_layers
from fmdeploy.export.lint.finding import Rule, Subject, Where
from fmdeploy.export.lint.numbers import levels_kind
from fmdeploy.export.lint.pairs import quantised_layers
from fmdeploy.onnxfile.graph import DQ, Q


def _signed(subject: Subject) -> Iterator[tuple[Where, str]]:
    for node in subject.nodes(Q):
        if node.input[0] not in subject.constants and levels_kind(subject, node) == TensorProto.INT8:
            yield subject.called(node), ""


def _middle(subject: Subject) -> Iterator[tuple[Where, str]]:
    """A ReLU whose result has a zero point in the middle."""
    for node in subject.nodes(Q):
        zero = subject.constants.get(node.input[2]) if len(node.input) > 2 else None
        moved = zero is not None and zero.dtype == np.uint8 and bool(np.all(zero > 0))
        if zero is not None and moved and subject.made_by(node.input[0], "Relu"):
            yield subject.called(node), f"zero point {int(zero.ravel()[0])}"


def _saturates(subject: Subject) -> Iterator[tuple[Where, str]]:
    complete = all(len(node.input) > 2 for node in subject.nodes(Q, DQ))
    unsigned = any(levels_kind(subject, node) == TensorProto.UINT8 for node in subject.nodes(Q))
    if complete and unsigned and any(True for _ in quantised_layers(subject)):
        for name in saturating_layers(subject.model):
            yield name, ""


RULES = (
    Rule("FMD501", "signed activations", {"ort": "slow"},
         "on x86, ONNX Runtime's fast kernels multiply unsigned activations with signed weights; ARM wants signed",
         "Use the int8-cpu file: export --from-onnx writes it", _signed,
         "ResNet-18, one thread: S8S8 26.8 to 194 ms, U8S8 10.6"),
    Rule("FMD502", "zero point in the middle behind a ReLU", {"ort": "slow"},
         "ONNX Runtime drops the ReLU only where the zero point does its work: at 0 of uint8",
         "Lower the file with export --from-onnx", _middle, "ResNet-18: 12 of 20 convolutions fuse, with 0 all 20"),
    Rule("FMD503", "products that can saturate without VNNI", {"ort": "risky"},
         "x86 without VNNI adds pairs of 8-bit products in 16 bits: a published ResNet-50 falls from 74.8 to 69.0 %",
         "Export with --cpu x86-64-avx2, or make sure that the machine has VNNI", _saturates,
         "github.com/intel/neural-compressor: list of validated models"),
)
