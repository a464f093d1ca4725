"""Files of the real exporter: the device reads what onnx reads, and its checks let them through."""

from __future__ import annotations

from pathlib import Path

from fmdeploy.runtime.bundle import open_bundle
from support.agreement import agree


def test_the_device_reads_what_the_exporter_wrote(pipeline: Path) -> None:
    bundle = open_bundle(pipeline / "bundle")
    assert {"fp32", "fp16", "int8", "int8-cpu"} <= set(bundle.variants)
    for variant in bundle.variants:
        agree(bundle.model_bytes(variant))
        if variant.startswith("int8"):
            assert bundle.declared(variant).pairs
