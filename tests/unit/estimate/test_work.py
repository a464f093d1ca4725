"""The work of a network does not depend on how its file was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from fmdeploy.errors import ModelFileError
from fmdeploy.estimate.fromonnx import Workload, read_work, work_of
from fmdeploy.estimate.fusion import ORT, ORT_INT8
from fmdeploy.estimate.networks.catalogue import NETWORKS, network
from fmdeploy.estimate.networks.resnet import resnet
from fmdeploy.estimate.networks.sketch import Sketch
from fmdeploy.estimate.networks.vit import vit
from fmdeploy.onnxfile.graph import DQ, Array, Q
from support.onnxgraphs import graph_of

# Parameters (10⁶) and multiply-adds (10⁹) as published: torchvision's and timm's tables, the YOLO model cards (GFLOPs / 2).
PUBLISHED = {
    "resnet18-224": (11.69, 1.814), "resnet34-224": (21.80, 3.664), "resnet50-224": (25.56, 4.089),
    "vit_tiny-224": (5.72, 1.26), "vit_small-224": (22.05, 4.61), "vit_base-224": (86.57, 17.58),
    "mobilenet_v2-224": (3.50, 0.301),
    "yolo11n-640": (2.6, 3.25), "yolo11s-640": (9.4, 10.75), "yolo11m-640": (20.1, 34.0), "yolo11l-640": (25.3, 43.45),
    "yolo11x-640": (56.9, 97.45), "yolov8n-640": (3.2, 4.35), "yolov5s-672": (7.2, 8.25 * (672 / 640) ** 2)}
KERNELS = {"resnet18-224": 24, "vit_tiny-224": 125}  # as TensorRT-RTX 1.7 lists them for these very graphs in FP16


@pytest.mark.parametrize("name", PUBLISHED)
def test_described_networks_have_the_published_size(name: str) -> None:
    net = network(name)
    parameters, gmac = PUBLISHED[name]
    assert net.parameters / 1e6 == pytest.approx(parameters, rel=0.016)
    assert work_of(net.model()).macs / 1e9 == pytest.approx(gmac, rel=0.01)


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - set(PUBLISHED)))
def test_other_networks_are_valid_files_whose_kernels_hold_all_macs(name: str) -> None:
    model = network(name).model()
    onnx.checker.check_model(model, full_check=True)
    work = work_of(model)
    assert work.macs > 0
    assert not work.unknown


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_those_that_tensorrt_lists(name: str) -> None:
    assert len(work_of(network(name).model()).rows) == KERNELS[name]


def test_resnet18_by_hand() -> None:
    rows = work_of(resnet(18).model()).rows
    first, pool = rows[1], rows[2]
    assert (first.kind, first.macs, first.weights) == ("conv", 64 * 112 * 112 * 3 * 49, 64 * 3 * 49)
    assert (first.reads, first.writes) == (3 * 224 * 224, 64 * 112 * 112)
    assert (pool.kind, pool.macs, pool.reads, pool.writes) == ("pool", 0, 64 * 112**2, 64 * 56**2)
    assert (first.inner, first.outer) == (147, 64)
    residual = rows[4]  # the second convolution of a block also reads what is added
    assert residual.reads == 2 * 64 * 56 * 56
    assert sum(row.weights for row in rows) == 11_678_912  # of 11,689,512 with vectors


def test_attention_is_one_kernel_and_counts_both_products() -> None:
    rows = [row for row in work_of(vit("tiny").model()).rows if row.kind == "attention"]
    assert len(rows) == 12
    assert {row.macs for row in rows} == {2 * 197 * 197 * 192}
    assert {(row.reads, row.writes) for row in rows} == {(3 * 197 * 192, 197 * 192)}


def test_folding_batch_normalisation_changes_nothing() -> None:
    folded = work_of(_conv_file(normalised=False))
    assert work_of(_conv_file(normalised=True)).rows == folded.rows


def test_a_file_with_qdq_pairs_has_the_work_of_the_float_file() -> None:
    plain = resnet(18, size=64).model()
    quantised = work_of(with_pairs(plain))
    floats = work_of(plain)
    assert quantised.quantised
    assert not floats.quantised
    assert [(r.name, r.kind, r.macs, r.weights, r.reads, r.writes) for r in quantised.rows] == [
        (r.name, r.kind, r.macs, r.weights, r.reads, r.writes) for r in floats.rows]
    convs = [row for row in quantised.rows if row.kind == "conv"]
    assert all(row.precision("int8") == "int8" for row in convs)
    assert next(row for row in quantised.rows if row.kind == "gemm").precision("int8") == "fp16"  # has no pairs


def test_a_layer_without_pairs_stays_float() -> None:
    model = resnet(18, size=64).model()
    third = [node.name for node in model.graph.node if node.op_type == "Conv"][2]
    rows = work_of(with_pairs(model, skip={third})).rows
    assert {row.name for row in rows if row.kind == "conv" and row.precision("int8") == "fp16"} == {third}


@pytest.mark.parametrize("quantised", [True, False])
def test_a_weight_may_be_transposed_behind_its_pair(quantised: bool) -> None:
    """That is how torch exports a quantised Linear."""
    constants: dict[str, Array] = {"w": np.ones((8, 4), np.float32), "s": np.array(0.1, np.float32),
                                   "z": np.array(0, np.int8)}
    pairs = [helper.make_node(op, [source, "s", "z"], [target]) for op, source, target in (
        (Q, "x", "xq"), (DQ, "xq", "xd"), (Q, "w", "wq"), (DQ, "wq", "wd"))]
    nodes = [*pairs, helper.make_node("Transpose", ["wd" if quantised else "w"], ["wt"]),
             helper.make_node("MatMul", ["xd", "wt"], ["y"], "/fc")]
    model = graph_of(nodes, inputs={"x": (1, 4)}, outputs={"y": (1, 8)}, constants=constants)
    (row,) = (row for row in work_of(model).rows if row.kind == "gemm")
    assert row.int8 is quantised


def test_int8_activations_are_those_that_only_int8_readers_see() -> None:
    work = work_of(vit("tiny").model())
    norm = next(row for row in work.rows if row.kind == "norm" and row.reads == row.writes)
    assert norm.int8_activations == norm.writes  # read by linear layers; what it reads is the float residual stream
    assert norm.precision("int8") == "fp16"


def test_a_dynamic_batch_counts_one_sample() -> None:
    fixed = _conv_file(normalised=False)
    open_batch = ModelProto()
    open_batch.CopyFrom(fixed)
    for value in [*open_batch.graph.input, *open_batch.graph.output]:
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    work = work_of(open_batch)
    assert (work.dynamic, work.batch) == (True, 1)
    assert work.rows == work_of(fixed).rows


def test_a_fixed_batch_counts_one_sample() -> None:
    net = Sketch("four", (4, 8, 16, 16))
    net.conv("input", 16, 3)
    work = work_of(net.model())
    one = Sketch("one", (1, 8, 16, 16))
    one.conv("input", 16, 3)
    assert (work.dynamic, work.batch) == (False, 4)
    assert work.rows == work_of(one.model()).rows


def test_another_dynamic_dimension_is_refused_by_name() -> None:
    model = _conv_file(normalised=False)
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_param = "width"
    with pytest.raises(ModelFileError, match=r"input 'x' has a dynamic dimension .*axis 3 \(width\)"):
        work_of(model)


def test_sizes_that_inference_leaves_open_are_found_by_running() -> None:
    nodes = [helper.make_node("NonZero", ["x"], ["where"]), helper.make_node("Transpose", ["where"], ["t"]),
             helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT16)]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
                              [helper.make_tensor_value_info("t", TensorProto.INT64, None),
                               helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1, 4])])
    work = work_of(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    assert work.unknown == (("NonZero", 1),)


def test_depthwise_and_grouped_convolutions_are_told_apart() -> None:
    net = Sketch("groups", (1, 32, 8, 8))
    net.conv(net.conv("input", 32, 3, groups=32), 64, 3, groups=4)
    depthwise, grouped = work_of(net.model()).rows
    assert (depthwise.kind, depthwise.macs) == ("depthwise", 32 * 64 * 9)
    assert (grouped.kind, grouped.macs, grouped.inner, grouped.outer) == ("conv", 64 * 64 * 72, 72, 16)


def test_reshapes_are_free_and_slices_are_copied_once() -> None:
    net = Sketch("free", (1, 16, 8, 8))
    x = net.conv("input", 32)
    x = net.reshape(net.reshape(x, (1, 32, 64)), (1, 32, 8, 8))
    net.conv(net.concat([net.part(x, 0, 16), net.conv(x, 16)]), 8)
    rows = work_of(net.model()).rows
    assert [row.kind for row in rows] == ["conv", "conv", "copy", "conv"]
    assert (rows[2].reads, rows[2].writes) == (16 * 64, 16 * 64)  # the other half is written in place


def test_onnx_runtime_fuses_less_than_tensorrt() -> None:
    model = vit("tiny").model()
    fewer, more = work_of(model), work_of(model, rules=ORT)
    assert len(more.rows) > len(fewer.rows)
    assert more.macs == fewer.macs
    assert "attention" not in {row.kind for row in more.rows}
    assert "transcendental" in {row.kind for row in more.rows}


def test_a_decomposed_layer_normalisation_is_one_kernel() -> None:
    net = Sketch("decomposed", (1, 16, 32))
    x = net.linear("input", 32)
    mean = net.node("ReduceMean", [x, net.integers((-1,))], (1, 16, 1))
    centred = net.node("Sub", [x, mean], (1, 16, 32))
    square = net.node("Mul", [centred, centred], (1, 16, 32))
    deviation = net.node("Sqrt", [net.node("ReduceMean", [square, net.integers((-1,))], (1, 16, 1))], (1, 16, 1))
    net.linear(net.node("Div", [centred, deviation], (1, 16, 32)), 8)
    whole = Sketch("whole", (1, 16, 32))
    whole.linear(whole.norm(whole.linear("input", 32)), 8)
    assert [(r.kind, r.macs, r.weights, r.reads, r.writes) for r in work_of(net.model()).rows] == [
        (r.kind, r.macs, r.weights, r.reads, r.writes) for r in work_of(whole.model()).rows]


def test_onnx_runtime_converts_int8_at_the_border_and_adds_in_nodes_of_their_own() -> None:
    model = with_pairs(resnet(18, size=64).model())
    rows = work_of(model, rules=ORT_INT8).rows
    assert rows[0].kind == "copy"
    assert sum(row.kind == "pointwise" and row.name.startswith("Add") for row in rows) == 8
    assert not any(row.kind == "pointwise" for row in work_of(model).rows)


def test_read_work_refuses_what_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"")
    with pytest.raises(ModelFileError, match=r"m\.onnx"):
        read_work(path)
    path.write_bytes(b"\x00\x01garbage" * 20)
    with pytest.raises(ModelFileError, match=r"m\.onnx"):
        read_work(path)


def test_workload_is_what_it_says() -> None:
    assert Workload((), batch=2).macs == 0


def _conv_file(*, normalised: bool) -> ModelProto:
    """Convolution (with BatchNormalization or with its result folded into weight and bias) and ReLU."""
    rng = np.random.default_rng(0)
    names = ["x", "w"] if normalised else ["x", "w", "b"]
    nodes = [helper.make_node("Conv", names, ["c"], name="conv", pads=[1] * 4, kernel_shape=[3, 3])]
    if normalised:
        nodes.append(helper.make_node("BatchNormalization", ["c", "b", "b", "b", "v"], ["n"], name="bn"))
    nodes.append(helper.make_node("Relu", [nodes[-1].output[0]], ["y"], name="relu"))
    weights = {"w": rng.standard_normal((16, 8, 3, 3)), "b": rng.standard_normal(16), "v": np.ones(16)}
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 12, 12])],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 16, 12, 12])],
                              [numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights.items()
                               if n != "v" or normalised])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def with_pairs(model: ModelProto, skip: frozenset[str] | set[str] = frozenset()) -> ModelProto:
    """Quantise every tensor and weight that a convolution reads, as modelopt's files do; `skip` names nodes."""
    quantised = ModelProto()
    quantised.CopyFrom(model)
    graph = quantised.graph
    nodes, made = [], {}
    graph.initializer.extend([numpy_helper.from_array(np.array(0.1, np.float32), "scale"),
                              numpy_helper.from_array(np.array(0, np.int8), "zero")])
    for node in list(graph.node):
        if node.op_type == "Conv" and node.name not in skip:
            for index in (0, 1):
                source = node.input[index]
                if source not in made:
                    nodes.append(helper.make_node(Q, [source, "scale", "zero"], [f"{source}_q"]))
                    nodes.append(helper.make_node(DQ, [f"{source}_q", "scale", "zero"], [f"{source}_dq"]))
                    made[source] = f"{source}_dq"
                node.input[index] = made[source]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return quantised
