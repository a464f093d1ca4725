"""Networks that torch.fx cannot follow, read with torch.export."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fmdeploy.iospec import IOSpec
from fmdeploy.quantize import modelopt
from fmdeploy.quantize.build import build, rebuild, tracing_example
from fmdeploy.quantize.flow import is_sum
from fmdeploy.quantize.ptq import QuantisedStudent, ptq
from fmdeploy.quantize.store import load_state, save_state
from fmdeploy.quantize.trace import as_tuple, float_graph, trace
from support.quantize_nets import samples_of
from support.traced_nets import Encoder, Functional, HuggingFaceViT, bev_vit, image, star

NETS: dict[str, Callable[[], tuple[nn.Module, IOSpec]]] = {
    "bev_vit": bev_vit, "encoder": lambda: image(Encoder), "hugging_face": lambda: image(HuggingFaceViT), "star": star,
}
WHY = {
    "bev_vit": r"modeling_dinov2\.py:\d+ `.*`: torch\.fx cannot follow this line",
    "encoder": r"encoder: torch\.fx does not look into TransformerEncoder",
    "hugging_face": r"modeling_vit\.py:\d+ `.*`: torch\.fx cannot follow this line",
    "star": r"sees all of \*args as one value",
}


@pytest.fixture(scope="module")
def vit() -> tuple[nn.Module, IOSpec, QuantisedStudent]:
    net, io = bev_vit()
    return net, io, ptq(net, io, samples_of(io))


def _names(io: IOSpec) -> list[str]:
    return [spec.name for spec in io.inputs]


@pytest.mark.parametrize("case", NETS)
def test_what_torch_fx_cannot_follow_is_exported_and_says_why(case: str) -> None:
    net, io = NETS[case]()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    traced = trace(net, tracing_example(io))
    assert traced.method == "export"
    assert re.search(WHY[case], traced.reason or ""), traced.reason
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    for batch in (1, 2, 5):
        inputs = samples_of(io, batch, seed=batch).tensors(_names(io))
        with torch.no_grad():
            for wanted, found in zip(as_tuple(net(*inputs)), as_tuple(traced.graph(*inputs)), strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_layers_keep_the_names_of_the_module(vit: tuple[nn.Module, IOSpec, QuantisedStudent]) -> None:
    net, io, _ = vit
    graph = float_graph(net, tracing_example(io))
    layers = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"
              if isinstance(graph.get_submodule(str(node.target)), nn.Linear | nn.Conv2d)}
    assert layers == {name for name, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert not [m for m in graph.modules() if isinstance(m, nn.BatchNorm2d)]


def test_packed_projections_of_torch_attention_become_linear_layers() -> None:
    net, io = image(Encoder)
    graph = float_graph(net, tracing_example(io))
    packed = graph.get_submodule("encoder.layers.1.self_attn.in_proj")
    assert isinstance(packed, nn.Linear)
    assert torch.equal(packed.weight, net.get_parameter("encoder.layers.1.self_attn.in_proj_weight"))


def test_only_linear_and_convolution_of_a_transformer_are_quantised(
    vit: tuple[nn.Module, IOSpec, QuantisedStudent]
) -> None:
    net, _, quantised_vit = vit
    placement = quantised_vit.placement
    assert placement.method == "export"
    assert {row.module for row in placement.weights} == {
        name for name, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)} - {"scene", "head.0"}
    whys = Counter(row.why for row in placement.floats)
    assert whys == {"a LayerNorm reads this residual stream": 4, "output head": 2, "one side is a constant": 1}
    assert placement.adds == ("add_9",), "the convolutional skip of the hybrid, and no sum of the encoder"
    quantised = {tensor for row in placement.activations for tensor in row.tensors}
    assert not quantised & {"softmax", "softmax_1", "cat_1", "add", "add_4",
                            "encoder_dinov2_embeddings_patch_embeddings_projection"}


def test_a_mask_of_zeros_is_dropped_from_every_attention(vit: tuple[nn.Module, IOSpec, QuantisedStudent]) -> None:
    net, io, _ = vit
    graph = float_graph(net, tracing_example(io))
    assert sum(is_sum(node) for node in graph.graph.nodes) == 6  # position, two a block, the skip
    assert not [node for node in graph.graph.nodes if "arange" in str(node.target)]


@pytest.mark.parametrize("case", NETS)
def test_an_exported_student_is_restored_bit_by_bit(case: str, tmp_path: Path) -> None:
    net, io = NETS[case]()
    quantised = ptq(net, io, samples_of(io))
    save_state(tmp_path / "q", quantised.module)
    other, _ = NETS[case]()
    for parameter in other.parameters():
        torch.nn.init.uniform_(parameter, -0.1, 0.1)
    restored = rebuild(other, tracing_example(io), quantised.placement)
    load_state(tmp_path / "q", restored)
    inputs = samples_of(io, 3, seed=7).tensors(_names(io))
    with torch.no_grad():
        pairs = zip(as_tuple(quantised.module(*inputs)), as_tuple(restored.eval()(*inputs)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_every_parameter_of_an_exported_student_can_be_trained(
    vit: tuple[nn.Module, IOSpec, QuantisedStudent]
) -> None:
    _, io, quantised = vit
    module = copy.deepcopy(quantised.module).train()
    sum(output.square().mean() for output in as_tuple(module(*tracing_example(io)))).backward()  # type: ignore[union-attr]
    assert not [name for name, p in module.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_an_exported_student_goes_to_onnx_with_norm_and_gelu_as_one_operator(
    vit: tuple[nn.Module, IOSpec, QuantisedStudent], tmp_path: Path
) -> None:
    _, io, quantised = vit
    module = quantised.module.eval()
    example = tuple(x[:1] for x in tracing_example(io))
    modelopt.onnx_export(module, example, str(tmp_path / "m.onnx"), opset_version=20, input_names=_names(io),
                         output_names=[spec.name for spec in io.outputs])
    found = Counter(node.op_type for node in onnx.load(str(tmp_path / "m.onnx")).graph.node)
    assert (found["LayerNormalization"], found["Gelu"], found["Erf"], found["ReduceMean"]) == (5, 2, 0, 0)


def test_constants_follow_the_input_to_its_device() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, *inputs: Tensor) -> Tensor:
            y_BC: Tensor = self.layer(inputs[0] * torch.arange(4, device=inputs[0].device))
            return y_BC

    graph = float_graph(Counting(), (torch.rand(1, 4),)).to("meta")
    assert graph(torch.rand(2, 4, device="meta")).device.type == "meta"


def test_functional_layers_are_lifted_or_listed() -> None:
    net, io = image(Functional)
    _, placement = build(net, samples_of(io), _names(io))
    assert placement.method == "fx"
    assert [row.module for row in placement.weights] == ["body.conv2d", "tied"]
    whys = {row.name: row.why for row in placement.floats}
    assert whys["conv2d_1"] == whys["matmul"] == "its weight belongs to no nn.Linear or nn.Conv"
    assert [row.kind for row in placement.floats] == ["function", "function", "Linear"]


def test_a_tied_weight_stays_one_parameter() -> None:
    net, io = image(Functional)
    graph = float_graph(net, tracing_example(io))
    assert [str(n.target) for n in graph.graph.nodes if n.op == "call_module" and "tied" in str(n.target)] == ["tied"] * 2


def _program(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    collection: Any = torch.export.ShapesCollection
    shapes = collection()
    for x in inputs:
        shapes[x] = {0: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        return torch.export.export(model, inputs, dynamic_shapes=shapes).module(check_guards=False)


def test_quirk_torch_export_fixes_a_batch_of_one() -> None:
    with pytest.raises(Exception, match="specialized|Constraints violated"):
        _program(nn.Linear(4, 2), torch.rand(1, 4))


def test_quirk_an_exported_module_cannot_be_trained_as_it_is() -> None:
    with pytest.raises(NotImplementedError):
        _program(nn.Linear(4, 2), torch.rand(2, 4)).train()


def test_quirk_folding_freezes_the_bias_that_it_makes() -> None:
    fused = fuse_conv_bn_eval(nn.Conv2d(3, 4, 1, bias=False).eval(), nn.BatchNorm2d(4).eval())
    assert fused.weight.requires_grad
    assert fused.bias is not None
    assert not fused.bias.requires_grad
