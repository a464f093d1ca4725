"""Small real bundles: a convolutional model in FP32 and its INT8 version, quantised by onnxruntime, sealed as a BUNDLE."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from fmdeploy.artifact import Artifact
from fmdeploy.budgets import AccuracyBudget, Budgets, TargetBudget
from fmdeploy.config import StageConfig
from fmdeploy.draft import Draft, produce
from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.manifest import Kind
from support.ort_static import samples_reader

Arrays = dict[str, np.ndarray[Any, Any]]
SCENES = 8


def io_spec(size: int = 16) -> IOSpec:
    """The demo task's inputs and outputs on a smaller grid."""
    return IOSpec(
        inputs=(
            TensorSpec(name="lidar", shape=(8, size, size), layout="CHW", value_range=(0.0, 1.0)),
            TensorSpec(name="camera", shape=(12, size, size), layout="CHW", value_range=(0.0, 1.0)),
        ),
        outputs=(TensorSpec(name="bev", shape=(5, size, size), layout="CHW"), TensorSpec(name="scene", shape=(SCENES,))),
        preprocessing="none",
    )


def inputs(count: int, size: int = 16, seed: int = 0) -> Arrays:
    """Sparse binary grids (count, C, size, size)."""
    rng = np.random.default_rng(seed)
    return {
        "lidar": (rng.random((count, 8, size, size)) < 0.2).astype(np.float32),
        "camera": (rng.random((count, 12, size, size)) < 0.3).astype(np.float32),
    }


@functools.cache
def fp32_model(size: int = 16, width: int = 8, seed: int = 0) -> bytes:
    """Concat, two convolutions, two heads: `bev` logits that follow the lidar, and `scene` logits."""
    rng = np.random.default_rng(seed)

    def weights(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32), name)

    conv: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Concat", ["lidar", "camera"], ["both"], axis=1),
        helper.make_node("Conv", ["both", "w1"], ["a1"], **conv),
        helper.make_node("Relu", ["a1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["a2"], **conv),
        helper.make_node("Relu", ["a2"], ["r2"]),
        helper.make_node("Conv", ["r2", "w3"], ["bev"], kernel_shape=[1, 1]),
        helper.make_node("GlobalAveragePool", ["r2"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w4"], ["scene"], transB=1),
    ]
    spec = io_spec(size)
    graph = helper.make_graph(
        nodes, "toy",
        [helper.make_tensor_value_info(s.name, TensorProto.FLOAT, [1, *s.shape]) for s in spec.inputs],
        [helper.make_tensor_value_info(s.name, TensorProto.FLOAT, [1, *s.shape]) for s in spec.outputs],
        [weights("w1", width, 20, 3, 3), weights("w2", width, width, 3, 3), weights("w3", 5, width, 1, 1),
         weights("w4", SCENES, width)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    raw: bytes = model.SerializeToString()
    return raw


@functools.cache
def int8_model(size: int = 16, width: int = 8, seed: int = 0) -> bytes:
    """`fp32_model`, statically quantised to U8S8 by onnxruntime."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "fp32.onnx"), Path(folder, "int8.onnx")
        source.write_bytes(fp32_model(size, width, seed))
        quantize_static(source, target, samples_reader(inputs(16, size, seed=100)), quant_format=QuantFormat.QDQ, per_channel=True,
                        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
        return target.read_bytes()


def run_model(model: bytes, batch: Arrays) -> Arrays:
    """Run samples one by one in bare onnxruntime."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    count = len(batch["lidar"])
    rows = [session.run(names, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(count)]
    return {name: np.concatenate([row[at] for row in rows]) for at, name in enumerate(names)}


def statistics(batch: Arrays) -> dict[str, Any]:
    """input_statistics.json of a calibration batch."""
    found = {}
    for name, array in batch.items():
        means = array.mean(axis=(2, 3), dtype=np.float64)
        energies = np.square(array, dtype=np.float64).mean(axis=(2, 3))
        found[name] = {"channel_mean": means.mean(0).tolist(), "channel_std": means.std(0).tolist(),
                       "energy_mean": energies.mean(0).tolist(), "energy_std": energies.std(0).tolist(),
                       "min": float(array.min()), "max": float(array.max())}
    return {"inputs": found}


def budgets(**accuracy: Any) -> Budgets:
    """Generous budgets for one target, `cpu`."""
    limits: dict[str, Any] = {"metric": "iou", "max_drop_vs_fp32": 0.2, "min_samples": 20, **accuracy}
    return Budgets(accuracy=AccuracyBudget(**limits), size_mib=8.0,
                   target={"cpu": TargetBudget(p50_ms=500.0, p99_ms=2000.0, peak_mib=4000.0)})


class BundleConfig(StageConfig):
    """What distinguishes one toy bundle from another."""

    label: str = "toy"


def make_bundle(
    out: Path,
    *,
    size: int = 16,
    width: int = 8,
    models: Mapping[str, bytes] | None = None,
    limits: Budgets | None = None,
    change: Any = None,
    parents: Mapping[str, Artifact] | None = None,
) -> Artifact:
    """Seal a BUNDLE made from `parents`. `change(draft)` may alter the payload before it is sealed."""
    variants = models or {"fp32": fp32_model(size, width), "int8-cpu": int8_model(size, width)}
    golden = inputs(4, size, seed=7)

    def build(draft: Draft) -> None:
        spec = io_spec(size)
        draft.write_json("io.json", spec.model_dump(mode="json"))
        tensors = {f"input.{name}": array for name, array in golden.items()}
        for variant, model in variants.items():
            draft.path(f"model.{variant}.onnx").write_bytes(model)
            tensors |= {f"output.{variant}.{name}": array for name, array in run_model(model, golden).items()}
        draft.write_tensors("golden.safetensors", tensors)
        draft.write_json("golden.json", {"variants": {variant: {"sqnr_db": 30.0} for variant in variants},
                                         "samples": [f"golden/{i}" for i in range(4)]})
        draft.write_json("input_statistics.json", statistics(inputs(64, size, seed=100)))
        draft.write_text("budgets.toml", (limits or budgets()).to_toml())
        draft.write_json("metrics.json", {})
        if change is not None:
            change(draft)

    return produce(out, Kind.BUNDLE, stage="export", config=BundleConfig(), inputs=parents or {}, build=build)
