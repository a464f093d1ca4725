"""Every rule fires on a file made for it and is silent on a good one; what TensorRT refuses is checked with TensorRT."""

from __future__ import annotations

import importlib.util
import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, defs, helper, numpy_helper

from fmdeploy.cli import main
from fmdeploy.errors import ModelFileError
from fmdeploy.export.branches import drop_branch_pairs
from fmdeploy.export.dialects import cpu_dialect
from fmdeploy.export.lint.finding import Finding, Subject, Target
from fmdeploy.export.lint.lint import lint_file, lint_model
from fmdeploy.export.lint.operators import UNKNOWN_TO_TENSORRT
from fmdeploy.export.lint.pairs import dequantized
from fmdeploy.export.lint.rules import RULES, as_markdown
from fmdeploy.export.tensorrt.builder import Options, build_engine
from fmdeploy.onnxfile.graph import DQ, Q
from fmdeploy.runtime.backends.tensorrt_api import load_api
from support.onnxgraphs import quantised_convs
from support.qdq import computed_scale, conv_file, file_of, one_node

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
X = (1, 4, 8, 8)
F = np.float32


def ids(model: ModelProto, target: Target = "tensorrt") -> set[str]:
    return {finding.id for finding in lint_model(model, target=target)}


def chain(*nodes: tuple[str, tuple[str, ...], str], constants: Mapping[str, Any] | None = None, opset: int = 18,
          kind: int = TensorProto.FLOAT) -> ModelProto:
    """x (1, 4, 8, 8) through nodes (type, inputs, output) named after their outputs; the last one makes y."""
    made = [helper.make_node(op_type, list(inputs), [output], name=output) for op_type, inputs, output in nodes]
    return file_of(made, {k: np.asarray(v) for k, v in (constants or {}).items()}, {"x": X}, {"y": X}, opset=opset, kind=kind)


def pair(tensor: str, name: str) -> tuple[tuple[str, tuple[str, ...], str], ...]:
    return (Q, (tensor, "s", "z"), f"{name}_q"), (DQ, (f"{name}_q", "s", "z"), name)


GRID: dict[str, Any] = {"s": F(0.05), "z": np.int8(0)}
W = np.random.default_rng(0).normal(0, 0.2, (4, 4, 1, 1)).astype(F)


def layer_norm(kind: int) -> ModelProto:
    two = {"two": np.asarray(2, helper.tensor_dtype_to_np_dtype(kind))}
    return chain(("ReduceMean", ("x",), "mean"), ("Sub", ("x", "mean"), "centred"), ("Pow", ("centred", "two"), "square"),
                 ("ReduceMean", ("square",), "variance"), ("Sqrt", ("variance",), "deviation"),
                 ("Div", ("centred", "deviation"), "y"), constants=two, kind=kind, opset=17)


def int32_bias() -> ModelProto:
    model = conv_file()
    stored = {"b": np.ones(4, np.int32), "sb": np.full(4, 4e-4, F), "zb": np.zeros(4, np.int32)}
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in stored.items())
    model.graph.node.insert(4, helper.make_node(DQ, ["b", "sb", "zb"], ["bf"], name="bias", axis=0))
    model.graph.node[5].input.append("bf")
    return model


def uint8_weights() -> ModelProto:
    model = conv_file(weight_scale=np.asarray(0.02, F), weight_zero=np.uint8(0))
    del model.graph.node[2]
    model.graph.node[2].input[0] = "levels"
    model.graph.initializer.append(numpy_helper.from_array(np.ones((4, 3, 3, 3), np.uint8), "levels"))
    return model


def float_data() -> ModelProto:
    model = conv_file()
    model.graph.node[4].input[0] = "x"
    return model


def split_relu() -> ModelProto:
    return chain(*pair("x", "a"), *pair("w", "b"), ("Conv", ("a", "b"), "c"), *pair("c", "d"), ("Relu", ("d",), "e"),
                 *pair("e", "y"), constants=GRID | {"w": W})


def float_add() -> ModelProto:
    return chain(*pair("x", "a"), *pair("w", "b"), ("Conv", ("a", "b"), "c"), ("Add", ("c", "x"), "y"),
                 constants=GRID | {"w": W})


def residual_stream() -> ModelProto:
    ones = {"g": np.ones(8, F), "h": np.zeros(8, F)}
    return chain(*pair("x", "a"), ("Relu", ("x",), "r"), ("Add", ("a", "r"), "t"),
                 ("LayerNormalization", ("t", "g", "h"), "y"), constants=GRID | ones)


def transposed() -> ModelProto:
    return chain(*pair("x", "a"), *pair("w", "b"), ("ConvTranspose", ("a", "b"), "y"), constants=GRID | {"w": W})


def depthwise() -> ModelProto:
    model = chain(*pair("x", "a"), *pair("w", "b"), ("Conv", ("a", "b"), "y"), constants=GRID | {"w": W[:, :1]})
    model.graph.node[4].attribute.append(helper.make_attribute("group", 4))
    return model


def batch_norm() -> ModelProto:
    numbers = {name: np.ones(4, F) for name in ("g", "b", "m", "v")}
    return chain(("Conv", ("x", "w"), "c"), ("BatchNormalization", ("c", "g", "b", "m", "v"), "y"),
                 constants={"w": W} | numbers)


def half_softmax() -> ModelProto:
    return chain(("Exp", ("x",), "e"), ("ReduceSum", ("e", "axis"), "t"), ("Div", ("e", "t"), "y"),
                 constants={"axis": np.array([3])}, kind=TensorProto.FLOAT16)


def half_mask() -> ModelProto:
    return chain(("Add", ("x", "mask"), "y"), constants={"mask": np.float16(-np.inf)}, kind=TensorProto.FLOAT16)


def dynamic() -> ModelProto:
    return one_node("Relu", shape=(None, 4, 8, 8))


def computed_weights() -> ModelProto:
    model = chain(("Conv", ("x", "w"), "y"))
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, (4, 4, 1, 1)))
    return model


def stored_input() -> ModelProto:
    model = chain(("Conv", ("x", "w"), "y"), constants={"w": W})
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, (4, 4, 1, 1)))
    return model


def grid_sample(opset: int) -> ModelProto:
    mode = "linear" if opset >= 20 else "bilinear"
    return one_node("GridSample", "x", "grid", constants={"grid": np.zeros((1, 5, 5, 2), F)}, opset=opset, mode=mode)


def resize(**attributes: object) -> ModelProto:
    return one_node("Resize", "x", "", "scales", constants={"scales": np.array([1, 1, 0.5, 0.5], F)},
                    mode="linear", **attributes)  # type: ignore[arg-type]


def scatter(op_type: str) -> ModelProto:
    sizes = ((1, 1, 8, 8), (1, 1, 8, 8)) if op_type == "ScatterElements" else ((1, 1), X)
    return one_node(op_type, "x", "i", "u", constants={"i": np.zeros(sizes[0], np.int64), "u": np.zeros(sizes[1], F)},
                    reduction="add")


def wide_kernel() -> ModelProto:
    return one_node("Conv", "x", "w", shape=(1, 4, 40, 8), constants={"w": np.ones((4, 4, 33, 1), F)})


# What each rule is for; the target that minds most comes first in the rule.
BROKEN: dict[str, list[Callable[[], ModelProto]]] = {
    "FMD001": [lambda: conv_file(zero=np.int8(3)), lambda: conv_file(zero=np.uint8(128))],
    "FMD002": [lambda: conv_file(zero=np.uint8(0))],
    "FMD003": [uint8_weights],
    "FMD004": [int32_bias],
    "FMD005": [computed_scale],
    "FMD006": [lambda: conv_file(zero=np.int16(0), opset=21, ir=10)],
    "FMD007": [lambda: one_node(Q, "x", "s", opset=21, result=TensorProto.INT4, constants={"s": np.asarray(F(0.1))},
                                output_dtype=TensorProto.INT4)],
    "FMD008": [lambda: conv_file(scale=np.full(3, 0.02, F), zero=np.zeros(3, np.int8))],
    "FMD009": [lambda: conv_file(weight_scale=np.full(3, 0.02, F), axis=1)],
    "FMD010": [lambda: one_node("DynamicQuantizeLinear", outputs=("q", "s", "z"), result=TensorProto.UINT8)],
    "FMD101": [lambda: chain(*pair("x", "a"), *pair("x", "b"), ("Add", ("a", "b"), "y"), constants=GRID)],
    "FMD102": [split_relu],
    "FMD103": [float_add],
    "FMD104": [float_data],
    "FMD105": [lambda: chain(*pair("x", "a"), *pair("w", "b"), ("Conv", ("a", "b"), "c"), ("Sigmoid", ("c",), "y"),
                             constants=GRID | {"w": W})],
    "FMD106": [lambda: chain(*pair("x", "a"), ("Softmax", ("a",), "y"), constants=GRID)],
    "FMD107": [residual_stream],
    "FMD108": [transposed],
    "FMD109": [depthwise],
    "FMD110": [conv_file],
    "FMD111": [lambda: quantised_convs(2, residual=True)],
    "FMD201": [lambda: one_node("Det", shape=(1, 4, 8, 8))],
    "FMD202": [lambda: resize(antialias=1), lambda: scatter("ScatterND"), lambda: scatter("ScatterElements"),
               lambda: resize(coordinate_transformation_mode="half_pixel_symmetric"),
               lambda: resize(keep_aspect_ratio_policy="not_larger"),
               lambda: one_node("MaxPool", kernel_shape=[3, 3], dilations=[2, 2]),
               lambda: one_node("MaxPool", outputs=("y", "indices"), kernel_shape=[2, 2]),
               lambda: one_node("AveragePool", kernel_shape=[3, 3], dilations=[2, 2], opset=19),
               lambda: one_node("NonZero", result=TensorProto.INT64)],
    "FMD203": [lambda: grid_sample(20)],
    "FMD204": [lambda: grid_sample(16)],
    "FMD205": [batch_norm],
    "FMD206": [lambda: layer_norm(TensorProto.FLOAT16)],
    "FMD207": [lambda: layer_norm(TensorProto.FLOAT)],
    "FMD208": [lambda: one_node("Erf")],
    "FMD209": [half_softmax],
    "FMD210": [half_mask],
    "FMD211": [computed_weights],
    "FMD301": [dynamic],
    "FMD302": [lambda: one_node("ArgMax", axis=1, result=TensorProto.INT64)],
    "FMD303": [lambda: one_node("Shape", result=TensorProto.INT64)],
    "FMD304": [lambda: one_node("Cast", kind=TensorProto.INT16, result=TensorProto.FLOAT, to=TensorProto.FLOAT),
               lambda: one_node("Cast", kind=TensorProto.UINT64, result=TensorProto.FLOAT, to=TensorProto.FLOAT)],
    "FMD305": [lambda: one_node("Neg", kind=TensorProto.DOUBLE)],
    "FMD306": [lambda: one_node("Relu", opset=11)],
    "FMD307": [lambda: one_node("Relu", opset=21)],
    "FMD308": [stored_input],
    "FMD309": [lambda: one_node("Relu", kind=TensorProto.FLOAT16)],
    "FMD401": [lambda: one_node("Erf")],
    "FMD402": [conv_file],
    "FMD403": [lambda: one_node("Relu", shape=(1, 4, 8, 8193)), lambda: one_node("Relu", shape=(4097, 1, 1, 1))],
    "FMD404": [lambda: chain(("Conv", ("x", "w"), "y"), constants={"w": W})],
    "FMD405": [wide_kernel],
    "FMD501": [conv_file],
    "FMD502": [lambda: chain(("Relu", ("x",), "r"), *pair("r", "y"), constants={"s": F(0.1), "z": np.uint8(128)})],
    "FMD503": [lambda: cpu_dialect(quantised_convs())],
}
MADE = [(name, k) for name, makers in BROKEN.items() for k in range(len(makers))]


@pytest.mark.parametrize(("name", "k"), MADE)
def test_rule_fires_on_what_it_is_for(name: str, k: int) -> None:
    rule = next(rule for rule in RULES if rule.id == name)
    model = BROKEN[name][k]()
    for target in rule.effect:
        found = [finding for finding in lint_model(model, target=target) if finding.id == name]
        assert found, f"{name} is silent for {target}"
        assert all(finding.severity == rule.severity(target) and finding.node for finding in found)


def test_every_rule_is_tested_and_complete() -> None:
    assert [rule.id for rule in RULES] == list(BROKEN), "a rule without a file, or in another order"
    for rule in RULES:
        assert re.fullmatch(r"FMD\d{3}", rule.id)
        assert rule.effect, rule.id
        assert min(len(rule.why), len(rule.fix), len(rule.title)) > 10, rule.id
        assert rule.source, rule.id


def test_good_files_have_no_errors_and_our_dialect_no_warnings() -> None:
    for model in (conv_file(), quantised_convs(3), quantised_convs(2, residual=True)):
        assert [f for f in lint_model(model) if f.severity == "error"] == []
    assert ids(quantised_convs(3)) == set()
    fused = quantised_convs(2, residual=True)
    drop_branch_pairs(fused)
    assert ids(fused) == set()


def test_each_dialect_is_wrong_for_the_other_target() -> None:
    model = quantised_convs(2)
    spelled = cpu_dialect(model)
    assert any(f.severity == "error" for f in lint_model(spelled)), "uint8 is not for TensorRT"
    assert not any(f.severity == "error" for f in lint_model(spelled, target="ort"))
    assert "FMD501" in ids(model, "ort")
    assert "FMD501" not in ids(spelled, "ort")


@needs_rtx
@pytest.mark.parametrize(("name", "k"), [pair for pair in MADE if pair[0] not in ("FMD005",)])
def test_errors_are_what_tensorrt_refuses(name: str, k: int) -> None:
    """Refused by the rule, refused by the compiler; and nothing else is. FMD005 is left out: it crashes the compiler."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the timing cache is deprecated in TensorRT-RTX
        built = build_engine(load_api("tensorrt-rtx"), BROKEN[name][k]().SerializeToString(), Options())
    refusing = {rule.id for rule in RULES if rule.effect.get("tensorrt") == "refused"}
    refused = ids(BROKEN[name][k]()) & refusing
    assert bool(refused) == (built.engine is None), [str(problem) for problem in built.problems][:2]


@needs_rtx
def test_computed_scales_crash_the_compiler(tmp_path: Path) -> None:
    """Which is why FMD005 is an error. When this fails, look what the compiler makes of them now."""
    from fmdeploy.export.tensorrt.compilecheck import compile_check

    (tmp_path / "m.onnx").write_bytes(computed_scale().SerializeToString())
    assert compile_check(tmp_path / "m.onnx").status in ("crashed", "rejected", "build-failed")


@needs_rtx
def test_list_of_unknown_operators_is_the_parsers() -> None:
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    parser = trt.OnnxParser(builder.create_network(0), logger)
    names = {schema.name for schema in defs.get_all_schemas() if schema.domain == ""}
    assert {name for name in names if not parser.supports_operator(name)} == UNKNOWN_TO_TENSORRT & names


def test_concatenations_of_concatenations_are_walked_once_each() -> None:
    """2^25 paths lead from the last one to the pair."""
    nested = tuple(helper.make_node("Concat", [f"c{k}", f"c{k}"], [f"c{k + 1}"], axis=1) for k in range(25))
    pair = (helper.make_node(Q, ["x", "s", "z"], ["q"]), helper.make_node(DQ, ["q", "s", "z"], ["c0"], name="dq"))
    constants: dict[str, Any] = {"s": np.ones((), np.float32), "z": np.zeros((), np.int8)}
    model = file_of([*pair, *nested], constants, {"x": (1, 1)}, {"c25": (1, 2**25)})
    found = dequantized(Subject(model), "c25")
    assert found is not None
    assert found.name == "dq"
    model.graph.node[-1].input[1] = "x"
    assert dequantized(Subject(model), "c25") is None, "one operand has no pair"


def test_unusable_file_is_an_error_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(ModelFileError, match="is empty"):
        lint_file(tmp_path / "m.onnx")


def test_findings_come_worst_first() -> None:
    found = lint_model(int32_bias())
    order = ["error", "warning", "info"]
    assert [f.severity for f in found] == sorted((f.severity for f in found), key=order.index)
    assert isinstance(found[0], Finding)
    assert found[0].node == "bias"


def test_command_prints_a_list_and_exits_1_on_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, model, code in (("bad", conv_file(zero=np.int8(3)), 1), ("good", conv_file(), 0)):
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(model.SerializeToString())
        with pytest.raises(SystemExit) as stopped:
            main(["export", "--lint", str(path), "--json"])
        assert stopped.value.code == code
        rows = json.loads(capsys.readouterr().out)
        assert isinstance(rows, list)
        assert all(set(row) == {"id", "node", "severity", "why", "fix"} for row in rows)
        assert {row["id"] for row in rows if row["severity"] == "error"} == ({"FMD001"} if code else set())
        assert [row["node"] for row in rows if row["id"] == "FMD001"] == (["q"] if code else [])


def test_document_is_the_table_of_rules(root: Path) -> None:
    text = (root / "docs" / "lint.md").read_text()
    assert as_markdown() in text, "write it again: python -c 'from fmdeploy.export.lint.rules import as_markdown; print(as_markdown())'"
