"""ONNX files: named, static, simplified, one Q/DQ pair a tensor, equal bytes for equal models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper
from torch import Tensor, nn

from fmdeploy.errors import ConfigError, ModelFileError
from fmdeploy.evaluate.sqnr import sqnr_db
from fmdeploy.export.formats import IR_VERSION, OPSET
from fmdeploy.export.lint.allowed import require_allowed
from fmdeploy.export.onnx import export_onnx, require_one_pair_a_tensor
from fmdeploy.export.variants import float_module
from fmdeploy.models.outputs import predictor
from fmdeploy.onnxfile.graph import DQ, Graph, Q, op_counts
from fmdeploy.onnxfile.session import ort_predictor
from fmdeploy.quantize.ptq import ptq
from support.quantize_nets import NETS, Residual, SmallViT, bev_student, image_net, io_of, samples_of, zero_gamma


@pytest.fixture(scope="module", params=[*NETS, "zero_gamma"])
def int8(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelProto, float, str]:
    """An INT8 file, its smallest SQNR against torch fake-quant, and the case."""
    torch.manual_seed(0)
    net, io = NETS.get(request.param, zero_gamma)()  # a branch that is constant, as ResNets start with
    quantised = ptq(net, io, samples_of(io))
    path = tmp_path_factory.mktemp("int8") / "model.onnx"
    model = export_onnx(quantised.module, io, path)
    inputs = samples_of(io, seed=9).inputs
    wanted = predictor(quantised.module, io)(inputs)
    found = ort_predictor(path, io, optimise=False)(inputs)
    return model, min(sqnr_db(wanted[name], found[name]) for name in wanted), request.param


def test_file_agrees_with_torch_fake_quant(int8: tuple[ModelProto, float, str]) -> None:
    assert int8[1] >= 40, f"{int8[2]}: {int8[1]:.1f} dB"


def test_every_zero_point_is_a_signed_zero(int8: tuple[ModelProto, float, str]) -> None:
    graph = Graph(int8[0])
    for node in graph.nodes(Q, DQ):
        zero = graph.constants[node.input[2]]
        assert zero.dtype == np.int8
        assert not zero.any()


def test_a_tensor_has_one_pair(int8: tuple[ModelProto, float, str]) -> None:
    graph = Graph(int8[0])
    require_one_pair_a_tensor(graph)
    assert len(graph.nodes(Q)) == len(graph.nodes(DQ)) > 0
    sources = [node.input[0] for node in graph.nodes(Q)]
    assert len(sources) == len(set(sources))


def test_modules_that_read_one_tensor_share_its_pair_even_without_a_graph(tmp_path: Path) -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x_BC: Tensor) -> Tensor:
            if x_BC.sum() > 1e9:
                x_BC = x_BC * 0
            y_BC: Tensor = self.head(torch.relu(self.a(x_BC)) * self.b(x_BC) + self.c(x_BC))
            return y_BC

    net, io = Three().eval(), io_of((6,), outputs=((2,),), positive=False)
    quantised = ptq(net, io, samples_of(io))
    assert quantised.placement.method == "modules"
    graph = Graph(export_onnx(quantised.module, io, tmp_path / "m.onnx"))
    assert [node.input[0] for node in graph.nodes(Q) if node.input[0] not in graph.constants] == ["x0"]


def test_biases_are_float_and_weights_have_a_scale_a_channel(int8: tuple[ModelProto, float, str]) -> None:
    graph = Graph(int8[0])
    for node in graph.nodes("Conv", "Gemm"):
        if len(node.input) > 2:
            assert graph.constants[node.input[2]].dtype == np.float32
        weight = graph.maker.get(node.input[1])
        if weight is not None and weight.op_type == DQ:
            values = graph.constants[graph.maker[weight.input[0]].input[0]]
            assert graph.constants[weight.input[1]].shape == (values.shape[0],)


def test_format_is_stated(int8: tuple[ModelProto, float, str]) -> None:
    model = int8[0]
    assert (model.ir_version, model.opset_import[0].version, len(model.opset_import)) == (IR_VERSION, OPSET, 1)
    assert not any(t.data_location == TensorProto.EXTERNAL for t in model.graph.initializer)
    assert not op_counts(model)["Constant"]
    onnx.checker.check_model(model, full_check=True)


def test_layernorm_stays_one_operator(tmp_path: Path) -> None:
    net, io = image_net(SmallViT())
    quantised = ptq(net, io, samples_of(io))
    assert op_counts(export_onnx(quantised.module, io, tmp_path / "m.onnx"))["LayerNormalization"] == 3


def test_no_batchnorm_is_left(tmp_path: Path) -> None:
    net, io = bev_student()
    model = export_onnx(float_module(net, io), io, tmp_path / "m.onnx")
    assert op_counts(model)["BatchNormalization"] == 0
    inputs = samples_of(io, 2, seed=3).inputs
    wanted, found = predictor(net, io)(inputs), ort_predictor(tmp_path / "m.onnx", io)(inputs)
    assert min(sqnr_db(wanted[n], found[n]) for n in wanted) > 80


def test_equal_models_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        net, io = bev_student()
        export_onnx(ptq(net, io, samples_of(io)).module, io, tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_no_path_of_this_machine_is_in_the_file(tmp_path: Path) -> None:
    net, io = image_net(Residual())
    export_onnx(ptq(net, io, samples_of(io)).module, io, tmp_path / "m.onnx")
    raw = (tmp_path / "m.onnx").read_bytes()
    assert b".py" not in raw
    assert str(Path.cwd()).encode() not in raw


@pytest.mark.parametrize("opset", [17, 20])
def test_other_opsets(opset: int, tmp_path: Path) -> None:
    net, io = bev_student()
    model = export_onnx(ptq(net, io, samples_of(io)).module, io, tmp_path / "m.onnx", opset=opset)
    assert model.opset_import[0].version == opset


def test_unsupported_opset_is_refused(tmp_path: Path) -> None:
    net, io = image_net(Residual())
    with pytest.raises(ConfigError, match="expected 17 to 20, found 21"):
        export_onnx(net, io, tmp_path / "m.onnx", opset=21)


def test_operator_without_onnx_form_is_one_line(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x_BC: Tensor) -> Tensor:
            y_BC: Tensor = torch.special.bessel_j0(x_BC)
            return y_BC

    with pytest.raises(ModelFileError, match="cannot be exported to ONNX") as caught:
        export_onnx(Odd(), io_of((3,), outputs=((3,),)), tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.onnx").exists()


def test_operator_outside_the_allowlist_is_named(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x_BC: Tensor) -> Tensor:
            return torch.cumsum(x_BC, 1)

    with pytest.raises(ModelFileError, match=r"holds the operator CumSum .* not on the allowlist"):
        export_onnx(Odd(), io_of((3,), outputs=((3,),)), tmp_path / "m.onnx")


def test_foreign_domain_is_refused() -> None:
    node = helper.make_node("FusedThing", ["x"], ["y"], domain="com.example")
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("x", "y")]
    with pytest.raises(ModelFileError, match=r"foreign domain: com\.example\.FusedThing"):
        require_allowed(helper.make_model(helper.make_graph([node], "g", value[:1], value[1:])), where="m.onnx")


def test_outputs_that_do_not_fit_the_task_are_refused(tmp_path: Path) -> None:
    net, _ = image_net(Residual())
    with pytest.raises(ModelFileError, match="does not have the inputs and outputs of the task"):
        export_onnx(net, io_of((3, 16, 16), outputs=((5,),)), tmp_path / "m.onnx")
