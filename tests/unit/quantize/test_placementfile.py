"""placement.toml: written, read back, edited, refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from fmdeploy.config import read_toml
from fmdeploy.errors import ConfigError
from fmdeploy.iospec import IOSpec
from fmdeploy.quantize.build import build, tracing_example
from fmdeploy.quantize.placement import Placement, Request
from fmdeploy.quantize.placementfile import read_placement, to_toml
from fmdeploy.quantize.policy import place
from fmdeploy.quantize.trace import float_graph
from support.quantize_nets import NETS, SkipConcat, SmallViT, bev_student, image_net, samples_of
from support.traced_nets import Functional, image, star


def _build(net: nn.Module, io: IOSpec, table: Path | None = None) -> Placement:
    request = Request(table=read_placement(table) if table else None)
    return build(net, samples_of(io), [spec.name for spec in io.inputs], request)[1]


def _file(folder: Path, text: str) -> Path:
    (folder / "placement.toml").write_text(text, encoding="utf-8")
    return folder / "placement.toml"


CASES: dict[str, Callable[[], tuple[nn.Module, IOSpec]]] = {
    **NETS, "star": star, "functional": lambda: image(Functional),
}


@pytest.mark.parametrize("case", CASES)
def test_writing_and_reading_back_gives_the_same_placement(case: str, tmp_path: Path) -> None:
    net, io = CASES[case]()
    placement = _build(net, io)
    path = _file(tmp_path, to_toml(placement))
    assert _build(net, io, path) == placement
    values = read_toml(path)
    assert values["method"] == placement.method
    assert {row["name"] for row in values["layer"] if row["precision"] == "int8"} == {
        *(row.module for row in placement.weights), *placement.adds}
    assert all(row["why"] for row in values["layer"] if row["precision"] == "float")
    assert len(values["tensor"]) == len(placement.activations)
    assert all(row["max_over_rms"] > 1 for row in values["tensor"])


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    net, io = bev_student()
    return float_graph(net, tracing_example(io))


def _edited(graph: fx.GraphModule, folder: Path, text: str) -> Placement:
    return place(graph, Request(table=read_placement(_file(folder, text))))


def test_an_edited_layer_is_obeyed_and_the_rest_is_decided_by_rule(graph: fx.GraphModule, tmp_path: Path) -> None:
    plain = place(graph)
    found = _edited(graph, tmp_path, '[[layer]]\nname = "lateral.0"\nprecision = "float"\n'
                    '[[layer]]\nname = "add"\nprecision = "float"\nwhy = "it is \\"mine\\""\n'
                    '[[layer]]\nname = "scene"\nprecision = "int8"\n')
    assert {r.module for r in found.weights} == {r.module for r in plain.weights} - {"lateral.0"} | {"scene"}
    assert set(found.adds) == set(plain.adds) - {"add", "add_3"}
    whys = {row.name: row.why for row in found.floats}
    assert (whys["lateral.0"], whys["add"]) == ("float in the placement file", 'it is "mine"')
    assert whys["add_3"] == "no INT8 layer feeds it", "it adds those two"
    assert "scene" not in whys


def test_keep_float_goes_before_the_file(graph: fx.GraphModule, tmp_path: Path) -> None:
    path = _file(tmp_path, '[[layer]]\nname = "lateral.0"\nprecision = "int8"\n')
    found = place(graph, Request(keep_float=("lateral.0", "add"), table=read_placement(path)))
    assert {"lateral.0", "add"} <= {row.name for row in found.floats if row.why == "kept float on request"}


def test_a_layer_in_float_reads_and_is_fed_in_float(graph: fx.GraphModule) -> None:
    tensors = {t for row in place(graph).activations for t in row.tensors}
    fewer = {t for row in place(graph, Request(keep_float=("trunk.1.second.0",))).activations for t in row.tensors}
    assert tensors - fewer == {"trunk_1_first_2"}


def test_a_calibrator_is_obeyed_by_any_name_of_the_shared_scale(graph: fx.GraphModule, tmp_path: Path) -> None:
    found = _edited(graph, tmp_path, '[[tensor]]\nname = "camera_bchw"\ncalibrator = "entropy"\n'
                    '[[tensor]]\nname = "stem_0_2"\ncalibrator = "default"\n')
    assert found.calibrators == dict.fromkeys(("lidar_bchw", "camera_bchw", "cat"), "entropy")
    again = _edited(graph, tmp_path, to_toml(found))
    assert again.calibrators == found.calibrators


def test_a_residual_stream_in_int8_is_obeyed(tmp_path: Path) -> None:
    net, io = image_net(SmallViT())
    path = _file(tmp_path, '[[layer]]\nname = "add_1"\nprecision = "int8"\n')
    assert _build(net, io, path).adds == ("add_1",)


LAYER = '[[layer]]\nname = "{}"\nprecision = "{}"\n'
TENSOR = '[[tensor]]\nname = "{}"\ncalibrator = "{}"\n'
BAD = {
    "a name that is close": (LAYER.format("latral.0", "float"),
                             r"placement\.toml: no conv, linear or sum is called 'latral\.0' \(expected lateral\.0"),
    "a name that is far": (LAYER.format("zzz", "int8"), r"is called 'zzz' \(expected add or "),
    "a tensor that is none": (TENSOR.format("stem_0_3", "max"), r"no tensor is called 'stem_0_3' \(expected stem_0_"),
    "a transposed convolution": (LAYER.format("head", "int8"), r"head: cannot run in INT8: TensorRT runs ConvTranspose"),
    "listed twice": (LAYER.format("stem.0.0", "int8") * 2, r"\[\[layer\]\] 'stem\.0\.0' is listed twice"),
    "a tensor twice": (TENSOR.format("cat", "max") * 2, r"\[\[tensor\]\] 'cat' is listed twice"),
    "another precision": (LAYER.format("stem.0.0", "fp16"), r"'layer\.0\.precision': input should be 'int8' or 'float'"),
    "a number as name": ("[[layer]]\nname = 3\nprecision = 'int8'\n", r"'layer\.0\.name': input should be a valid string"),
    "no name": ("[[layer]]\nprecision = 'int8'\n", r"'layer\.0\.name' is required"),
    "an unknown key": ('[[layer]]\nname = "add"\nprecision = "int8"\ncolour = 1\n', r"unknown key 'layer\.0\.colour'"),
    "a table for a list": ("layer = 3\n", r"'layer': input should be a valid"),
    "an unknown calibrator": (TENSOR.format("cat", "median"), r"'max', 'entropy', 'percentile', 'mse' or 'auto'"),
    "two calibrators, one scale": (TENSOR.format("cat", "max") + TENSOR.format("lidar_bchw", "mse"),
                                   "share one scale have one calibrator"),
    "not TOML": ("[[layer\n", "is not TOML"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused_in_one_line(case: str, graph: fx.GraphModule, tmp_path: Path) -> None:
    text, message = BAD[case]
    with pytest.raises(ConfigError, match=message) as caught:
        _edited(graph, tmp_path, text)
    assert "\n" not in str(caught.value)
    assert "placement.toml" in str(caught.value)


class Sums(nn.Module):
    """A sum with a constant, a scaled one, one that broadcasts, and one of two float tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.shift = nn.Parameter(torch.ones(1, 4, 1, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.a(x_BCHW) + self.shift
        y_BCHW = y_BCHW.add(self.b(y_BCHW), alpha=2)
        y_BCHW = self.c(y_BCHW) + y_BCHW.mean((2, 3), keepdim=True)
        z_BCHW: Tensor = y_BCHW.exp() + y_BCHW.sin()
        return z_BCHW


@pytest.mark.parametrize(("name", "why"), [
    ("add", "one side is a constant"), ("add_1", "alpha is 2: no INT8 kernel scales one side"),
    ("add_2", "broadcasts 1x4x1x1 over 1x4x16x16"), ("add_3", "no INT8 layer feeds it"),
])
def test_sums_that_are_no_residuals_are_listed_and_refused_in_int8(name: str, why: str, tmp_path: Path) -> None:
    net, io = image_net(Sums(), outputs=((4, 16, 16),))
    graph = float_graph(net, tracing_example(io))
    assert {row.name: row.why for row in place(graph).floats}[name] == why
    with pytest.raises(ConfigError, match=f"{name}: cannot run in INT8: {why}"):
        _edited(graph, tmp_path, LAYER.format(name, "int8"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml: no such configuration file"):
        read_placement(tmp_path / "gone.toml")


def test_files_for_untraceable_modules_are_obeyed_and_refused(tmp_path: Path) -> None:
    net, io = NETS["untraceable"]()
    path = _file(tmp_path, LAYER.format("second", "float") + LAYER.format("head", "int8")
                 + TENSOR.format("input of head", "mse"))
    found = _build(net, io, path)
    assert [row.module for row in found.weights] == ["first", "head"]
    assert found.calibrators == {"input of head": "mse"}
    for text, message in ((LAYER.format("secnd", "float"), "no conv or linear is called 'secnd'.*second"),
                          (TENSOR.format("input of fist", "max"), "no tensor is called 'input of fist'")):
        with pytest.raises(ConfigError, match=message):
            _build(net, io, _file(tmp_path, text))
    with pytest.raises(ConfigError, match="no conv or linear is called 'nope'"):
        build(net, samples_of(io), ["x0"], Request(keep_float=("nope",)))


def test_names_with_odd_characters_survive(tmp_path: Path) -> None:
    odd = 'a "b" \\ ü \x7f'
    net = nn.Sequential()
    net.add_module(odd, nn.Conv2d(3, 4, 1))
    net.add_module("head", nn.Conv2d(4, 1, 1))
    _, io = image_net(SkipConcat(), outputs=((1, 16, 16),))
    placement = _build(net.eval(), io)
    path = _file(tmp_path, to_toml(placement))
    assert odd in read_placement(path).layers
    assert _build(net, io, path) == placement
