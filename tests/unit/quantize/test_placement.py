"""Where quantizers go."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from fmdeploy.errors import ArtifactError, ConfigError, InputError
from fmdeploy.iospec import IOSpec
from fmdeploy.quantize.build import QUANTIZERS, build, rebuild, tracing_example
from fmdeploy.quantize.placement import Placement, Request
from fmdeploy.quantize.policy import place
from fmdeploy.quantize.trace import float_graph
from support.quantize_nets import Branching, Residual, SkipConcat, SmallViT, bev_student, image_net, io_of, samples_of
from support.traced_nets import Bottleneck, image


def _placement(net: nn.Module, shape: tuple[int, ...] = (3, 16, 16)) -> Placement:
    return place(float_graph(net, (torch.rand(1, *shape),)))


def _built(net: nn.Module, io: IOSpec, request: Request = Request()) -> tuple[nn.Module, Placement]:  # noqa: B008
    return build(net, samples_of(io), [spec.name for spec in io.inputs], request)


def _group(placement: Placement, tensor: str) -> str:
    return next(row.quantizer for row in placement.activations if tensor in row.tensors)


@pytest.fixture(scope="module")
def bev() -> tuple[fx.GraphModule, Placement]:
    net, io = bev_student()
    graph = float_graph(net, tracing_example(io))
    return graph, place(graph)


def test_every_conv_but_the_heads_is_quantised(bev: tuple[fx.GraphModule, Placement]) -> None:
    graph, placement = bev
    layers = {n for n, m in graph.named_modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.ConvTranspose2d)}
    heads = {n for n in layers if n.startswith(("head", "scene"))}
    assert {row.module for row in placement.weights} == layers - heads
    assert {row.why for row in placement.floats} == {"output head", "TensorRT runs ConvTranspose in float"}


def test_every_residual_add_is_quantised(bev: tuple[fx.GraphModule, Placement]) -> None:
    graph, placement = bev
    sums = [node.name for node in graph.graph.nodes if node.name.startswith("add")]
    assert list(placement.adds) == sums


def test_a_tensor_has_one_quantizer_that_all_its_readers_share(bev: tuple[fx.GraphModule, Placement]) -> None:
    _, placement = bev
    tensors = [tensor for row in placement.activations for tensor in row.tensors]
    assert len(tensors) == len(set(tensors))
    readers = {row.tensors: row.readers for row in placement.activations}
    stem = next(r for t, r in readers.items() if "stem_0_2" in t)
    assert len(stem) == 2, "the residual block's first conv and its add read one quantised tensor"


def test_quantizers_stand_behind_the_relu(bev: tuple[fx.GraphModule, Placement]) -> None:
    graph, placement = bev
    quantised = {tensor for row in placement.activations for tensor in row.tensors}
    for node in graph.graph.nodes:
        if [user.name for user in node.users if "relu" in str(user.name)] and len(node.users) == 1:
            assert node.name not in quantised


def test_inputs_share_one_scale_through_the_concat(bev: tuple[fx.GraphModule, Placement]) -> None:
    _, placement = bev
    first = placement.activations[0]
    assert first.tensors == ("lidar_bchw", "camera_bchw", "cat")


def test_scale_is_shared_through_resize_pool_concat() -> None:
    placement = _placement(SkipConcat())
    assert len({_group(placement, t) for t in ("relu", "max_pool2d", "interpolate", "cat", "mul")}) == 1
    assert _group(placement, "x_bchw") != _group(placement, "relu")


def test_transformer_keeps_norm_softmax_and_residual_stream_float() -> None:
    placement = _placement(SmallViT())
    assert {row.module for row in placement.weights} == {"patch", "qkv", "proj", "up", "down"}
    assert placement.adds == ()
    readers = {reader for row in placement.activations for reader in row.readers}
    assert not readers & {"norm1", "norm2", "norm3", "softmax", "matmul", "matmul_1", "add_1", "add_2"}
    assert {row.why for row in placement.floats} == {
        "one side is a constant", "a LayerNorm reads this residual stream", "output head"}


def test_bias_add_is_no_residual() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.shift = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Parameter(torch.ones(1, 4, 1, 1))

        def forward(self, x_BCHW: Tensor) -> Tensor:
            y_BCHW: Tensor = self.b(self.a(x_BCHW) + self.shift)
            return y_BCHW

    assert _placement(Shifted()).adds == ()


def test_add_is_found_however_it_is_spelled() -> None:
    class Spelled(nn.Module):
        def __init__(self, how: int) -> None:
            super().__init__()
            self.how, self.a, self.b = how, nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x_BCHW: Tensor) -> Tensor:
            y_BCHW = self.a(x_BCHW)
            if self.how == 0:
                y_BCHW = y_BCHW + x_BCHW
            elif self.how == 1:
                y_BCHW = torch.add(y_BCHW, x_BCHW)
            elif self.how == 2:
                y_BCHW = y_BCHW.add(x_BCHW)
            elif self.how == 3:
                y_BCHW += x_BCHW
            elif self.how == 4:
                y_BCHW = torch.add(input=y_BCHW, other=x_BCHW)
            elif self.how == 5:
                y_BCHW = torch.add(y_BCHW, other=x_BCHW)
            else:
                y_BCHW = y_BCHW.add(other=x_BCHW)
            z_BCHW: Tensor = self.b(y_BCHW)
            return z_BCHW

    assert [len(_placement(Spelled(how)).adds) for how in range(7)] == [1] * 7


def test_shared_weight_is_float_everywhere_when_one_call_is_a_head() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x_BCHW: Tensor) -> Tensor:
            y_BCHW: Tensor = self.conv(self.other(self.conv(x_BCHW)))
            return y_BCHW

    placement = _placement(Twice())
    assert [row.module for row in placement.weights] == ["other"]
    assert [(row.name, row.why) for row in placement.floats] == [("conv", "output head")] * 2


def test_transposed_convolution_stays_float_with_its_reason() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Conv2d(4, 2, 1))
    floats = {row.node: row.why for row in _placement(net).floats}
    assert floats == {"_2": "TensorRT runs ConvTranspose in float", "_3": "output head"}


def test_keep_float_and_quantise_heads() -> None:
    net, _ = image_net(Residual())
    graph = float_graph(net, (torch.rand(1, 3, 16, 16),))
    assert [row.module for row in place(graph, Request(keep_float=("conv",))).weights] == ["stem"]
    assert [row.module for row in place(graph, Request(quantise_heads=True)).weights] == ["stem", "conv", "head"]
    with pytest.raises(ConfigError, match="no conv, linear or sum is called 'nothing'"):
        place(graph, Request(keep_float=("nothing",)))


def test_table_survives_json(bev: tuple[fx.GraphModule, Placement]) -> None:
    _, placement = bev
    assert Placement.from_json(json.loads(json.dumps(placement.to_json()))) == placement
    with pytest.raises(ArtifactError, match="unknown placement format"):
        Placement.from_json({**placement.to_json(), "format": 99})
    with pytest.raises(ArtifactError, match="lacks a field"):
        Placement.from_json({"format": 2, "method": "fx"})


def test_untraceable_module_gets_quantised_layers_and_the_line_is_recorded() -> None:
    module, placement = _built(Branching(), io_of((6,), outputs=((3,),)))
    assert placement.method == "modules"
    assert "if x_BC.sum() > 0:" in (placement.reason or "")
    assert [row.module for row in placement.weights] == ["first", "second"]
    assert [(row.node, row.why) for row in placement.floats] == [("head", "output head")]
    assert not hasattr(module, QUANTIZERS)


def test_heads_of_an_untraceable_module_with_two_outputs_are_found() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.body, self.unused = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(2, 2)
            self.planes, self.label = nn.Conv2d(4, 2, 1), nn.Linear(4, 3)

        def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
            x_BCHW = torch.relu(self.enter(x_BCHW))
            if x_BCHW.mean() > -1:
                x_BCHW = torch.relu(self.body(x_BCHW))
            return torch.sigmoid(self.planes(x_BCHW)), self.label(x_BCHW.mean((2, 3)))

    _, placement = _built(TwoHeads(), io_of((3, 4, 4), outputs=((2, 4, 4), (3,))))
    assert [row.module for row in placement.weights] == ["enter", "body"]
    assert {row.node for row in placement.floats} == {"planes", "label"}
    _, placement = _built(TwoHeads(), io_of((3, 4, 4), outputs=((2, 4, 4), (3,))), Request(quantise_heads=True))
    assert [row.module for row in placement.weights] == ["enter", "body", "planes", "label"]


def test_nothing_to_quantise_is_an_error() -> None:
    with pytest.raises(InputError, match="no conv or linear layer"):
        _built(nn.Sequential(nn.ReLU(), nn.Flatten()), io_of((3, 2, 2), outputs=((12,),)))


def test_changed_student_code_is_noticed_when_rebuilding() -> None:
    net, io = bev_student()
    _, placement = _built(net, io)
    row = replace(placement.activations[0], tensors=("gone",))
    with pytest.raises(ArtifactError, match="code has changed since it was quantised: 'gone'"):
        rebuild(net, tracing_example(io), replace(placement, activations=(row, *placement.activations[1:])))


def test_two_inputs_of_one_add_both_get_a_quantizer(bev: tuple[fx.GraphModule, Placement]) -> None:
    graph, placement = bev
    quantised = {tensor for row in placement.activations for tensor in row.tensors}
    for node in graph.graph.nodes:
        if node.name in placement.adds:
            assert {source.name for source in node.all_input_nodes} <= quantised
    assert io_of((3, 4, 4), outputs=((1,),)).inputs[0].name == "x0"


def test_patches_go_into_the_residual_stream_as_they_are() -> None:
    tensors = {t for row in _placement(SmallViT()).activations for t in row.tensors}
    assert "patch" not in tensors
    assert {"x_bchw", "norm1", "norm2", "gelu"} <= tensors


def test_an_average_pool_has_a_scale_on_each_side() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    placement = _placement(net)
    assert _group(placement, "_1") != _group(placement, "_2")


def test_a_max_pool_shares_the_scale_of_what_it_reads() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    placement = _placement(net)
    assert _group(placement, "_1") == _group(placement, "_2")


class ConvStream(nn.Module):
    """ConvNeXt in small: a LayerNorm reads, behind moves, the stream that convolutions and sums write."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.mix, self.norm = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 4, 3, padding=1), nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.enter(x_BCHW)
        x_BCHW = x_BCHW + self.mix(x_BCHW)
        x_BCHW = x_BCHW + torch.relu(self.mix(x_BCHW))
        y_BC: Tensor = self.head(self.norm(x_BCHW.permute(0, 2, 3, 1)).mean((1, 2)))
        return y_BC


def test_a_stream_that_a_layernorm_reads_stays_float_although_convolutions_feed_it() -> None:
    placement = _placement(ConvStream())
    assert [row.module for row in placement.weights] == ["enter", "mix"]
    assert placement.adds == ()
    assert {row.why for row in placement.floats} == {"a LayerNorm reads this residual stream", "output head"}


class StreamOut(nn.Module):
    """Returns its residual stream, and the first result again through a second head."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.body, self.last = (nn.Conv2d(n, 4, 3, padding=1) for n in (3, 4, 4))
        self.first, self.second = nn.Conv2d(4, 2, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_BCHW = torch.relu(self.enter(x_BCHW))
        x_BCHW = torch.relu(x_BCHW + self.body(x_BCHW))
        stream_BCHW = x_BCHW + self.last(x_BCHW)
        once_BCHW = self.first(stream_BCHW)
        return stream_BCHW, once_BCHW, self.second(torch.cat((stream_BCHW, once_BCHW), 1))


def test_heads_are_the_last_layers_also_where_a_residual_stream_is_an_output() -> None:
    whys = {row.name: row.why for row in _placement(StreamOut()).floats}
    assert {name for name, why in whys.items() if why == "output head"} == {"first", "second"}
    assert [row.module for row in _placement(StreamOut()).weights] == ["enter", "body", "last"]


def test_a_resnet_is_quantised_but_for_its_head() -> None:
    net, io = image(Bottleneck)
    placement = place(float_graph(net, tracing_example(io)))
    assert len(placement.weights) == 8
    assert len(placement.adds) == 2
    assert [(row.name, row.why) for row in placement.floats] == [("fc", "output head")]
