"""SmoothQuant leaves the float network as it is and helps INT8; weight clipping lowers the error of every layer."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fmdeploy.errors import ConfigError
from fmdeploy.evaluate.sqnr import sqnr_db
from fmdeploy.iospec import IOSpec
from fmdeploy.quantize import modelopt
from fmdeploy.quantize.build import apply, build
from fmdeploy.quantize.calibrate import CalibrationSet, calibrate
from fmdeploy.quantize.clip import clip
from fmdeploy.quantize.grid import STEPS
from fmdeploy.quantize.placement import Request
from fmdeploy.quantize.policy import place
from fmdeploy.quantize.ptq import ptq
from fmdeploy.quantize.smooth import factors, smooth
from fmdeploy.quantize.trace import float_graph
from support.quantize_nets import Residual, SmallViT, image_net, io_of, samples_of


class _Norms(nn.Module):
    """A LayerNorm with two Linear readers, one that an activation reads, one without a scale, and one called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.read, self.bare = nn.LayerNorm(8), nn.LayerNorm(8, elementwise_affine=False)
        self.twice, self.last, self.end = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x_BND: Tensor) -> Tensor:
        y_BND = self.norm(x_BND)
        x_BND = self.q(y_BND) * torch.sigmoid(self.k(y_BND))
        x_BND = self.last(torch.relu(self.read(x_BND)))
        x_BND = self.end(self.bare(x_BND)) + self.end(self.twice(self.twice(x_BND)))
        return x_BND.mean(1)


def _norms() -> tuple[fx.GraphModule, IOSpec]:
    torch.manual_seed(0)
    net, io = _Norms().eval(), io_of((4, 8), outputs=((3,),), positive=False)
    return float_graph(net, samples_of(io).tensors(["x0"], slice(0, 1))), io


def _vit_with_outliers() -> tuple[nn.Module, IOSpec]:
    """The small ViT with two channels whose scale is 40 times that of the others, as in large transformers."""
    net, io = image_net(SmallViT())
    with torch.no_grad():
        for name in ("norm1", "norm2"):
            net.get_parameter(f"{name}.weight")[:2] *= 40
        for name in ("qkv", "up"):
            net.get_parameter(f"{name}.weight")[:, :2] /= 40
    return net, io


def _graph(net: nn.Module, calibration_set: CalibrationSet) -> fx.GraphModule:
    return float_graph(net, calibration_set.tensors(["x0"], slice(0, 1)))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothing_leaves_the_float_network_as_it_is(alpha: float) -> None:
    graph, io = _norms()
    x = samples_of(io, 8, seed=3).tensors(["x0"])
    with torch.no_grad():
        before = graph(*x)
        weight = graph.get_parameter("q.weight").clone()
        rows = {row.norm: row for row in smooth(graph, samples_of(io), ["x0"], alpha)}
        after = graph(*x)
    assert not torch.equal(weight, graph.get_parameter("q.weight"))
    assert float((after - before).abs().max()) < 2e-6 * float(before.abs().max())
    assert rows["norm"].readers == ("q", "k")
    assert not rows["norm"].skipped
    assert rows["norm"].low < rows["norm"].high


def test_what_cannot_be_smoothed_is_listed_with_its_reason() -> None:
    graph, io = _norms()
    why = {row.norm: row.skipped for row in smooth(graph, samples_of(io), ["x0"], 0.5) if row.skipped}
    assert why == {
        "read": "something other than a Linear reads it", "bare": "has no scale and shift for each channel",
        "twice": "is called, or read by a layer that is called, more than once",
    }
    for alpha in (-0.1, 1.5):
        with pytest.raises(ConfigError, match="smooth.*alpha from 0 to 1"):
            smooth(graph, samples_of(io), ["x0"], alpha)


class _Tied(nn.Module):
    """Two Linear layers of one weight; a LayerNorm feeds the first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second, self.end = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.second.weight = self.first.weight

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = torch.relu(self.first(self.norm(x_BND)))
        found: Tensor = self.end(torch.relu(self.second(x_BND))).mean(1)
        return found


def test_a_weight_that_another_layer_uses_too_is_left_alone() -> None:
    torch.manual_seed(0)
    io = io_of((4, 8), outputs=((3,),), positive=False)
    x = samples_of(io).tensors(["x0"])
    graph = float_graph(_Tied(), x)
    before = graph(*x)
    rows = smooth(graph, samples_of(io), ["x0"], 0.5)
    assert [row.skipped for row in rows] == ["shares a parameter with another layer, or is read by one that does"]
    assert torch.equal(graph(*x), before)


def test_smoothing_in_vain_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    net, io = image_net(Residual())
    ptq(net, io, samples_of(io), smooth=0.5)
    assert "smoothing changed nothing: there is no LayerNorm" in capsys.readouterr().err


def test_order_of_samples_changes_no_factor() -> None:
    graph, io = _norms()
    other, _ = _norms()
    plain = samples_of(io)
    smooth(graph, plain, ["x0"])
    smooth(other, plain.take([5, 2, 0, 4, 1, 3]), ["x0"])
    assert all(torch.equal(a, b) for a, b in zip(graph.parameters(), other.parameters(), strict=True))


def _int8(graph: fx.GraphModule, calibration_set: CalibrationSet) -> nn.Module:
    placement = place(graph, Request())
    module = apply(graph, placement)
    calibrate(module, placement, calibration_set, ["x0"])
    return module


def test_smoothing_helps_int8_where_channels_are_outliers() -> None:
    net, io = _vit_with_outliers()
    samples, x = samples_of(io), samples_of(io, 16, seed=4).tensors(["x0"])
    plain, smoothed = _graph(net, samples), _graph(net, samples)
    rows = smooth(smoothed, samples, ["x0"], 0.5)
    assert all(row.after < 0.5 * row.before for row in rows if not row.skipped)
    with torch.no_grad():
        wanted = net(*x).numpy()
        before, after = (sqnr_db(wanted, _int8(graph, samples)(*x).numpy()) for graph in (plain, smoothed))
    assert after > before + 3, f"{before:.1f} dB plain, {after:.1f} dB smoothed"


def _modelopt(model: nn.Module, weight: dict[str, Any], algorithm: dict[str, Any], x: Tensor) -> nn.Module:
    rules = [{"quantizer_name": "*", "enable": False},
             {"quantizer_name": "*weight_quantizer", "cfg": weight, "enable": True},
             {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": None}, "enable": True}]
    mtq = modelopt.load()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: nn.Module = mtq.quantize(model, {"quant_cfg": rules, "algorithm": algorithm}, lambda m: m(x))
    return found


def test_factors_are_those_of_modelopt() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    weight, x = model.get_parameter("0.weight").detach().clone(), torch.randn(64, 16) * torch.logspace(-2, 2, 16)
    theirs = _modelopt(model, {"num_bits": 8, "axis": 0}, {"method": "smoothquant", "alpha": 0.5}, x)
    own = factors(x.abs().amax(0), weight.abs().amax(0), 0.5)
    scale: Any = theirs.get_submodule("0.input_quantizer").pre_quant_scale
    assert torch.allclose(1 / scale.flatten(), own, rtol=1e-5)
    assert float(own.max() / own.min()) > 50


def test_quirk_modelopt_leaves_the_smoothing_product_in_the_graph() -> None:
    """The reason for folding it ourselves."""
    theirs = _modelopt(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8)).eval(), {"num_bits": 8, "axis": 0},
                       {"method": "smoothquant", "alpha": 0.5}, torch.randn(64, 16))
    assert torch.equal(theirs.get_parameter("0.weight"), torch.ones(16))


def _calibrated() -> tuple[nn.Module, CalibrationSet, dict[str, Tensor]]:
    torch.manual_seed(0)
    net, io = image_net(SmallViT())
    samples = samples_of(io)
    module, placement = build(net, samples, ["x0"], Request())
    calibrate(module, placement, samples, ["x0"])
    return module, samples, modelopt.ranges(module)


def test_clipping_lowers_the_error_of_every_layer_and_stays_on_the_grid() -> None:
    module, samples, before = _calibrated()
    rows = clip(module, samples, ["x0"])
    after = modelopt.ranges(module)
    assert {f"{row.module}.weight_quantizer" for row in rows} == set(modelopt.weight_ranges(module))
    assert all(row.after_db >= row.before_db for row in rows)
    assert any(row.channels and row.after_db > row.before_db for row in rows)
    for name, amax in after.items():
        scale = amax / STEPS
        assert torch.equal(scale, scale.half().float())
        assert bool((amax <= before[name]).all())
        if not name.endswith("weight_quantizer"):
            assert torch.equal(amax, before[name])
    again = replace(samples, ids=samples.ids[::-1], inputs={"x0": samples.inputs["x0"][::-1].copy()})
    other, _, _ = _calibrated()
    assert clip(other, again, ["x0"]) == rows


def _wide() -> nn.Module:
    """Rows so long that 8 bits, too, gain from ranges a twentieth narrower."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8192, 12)).eval()
    nn.init.normal_(model.get_parameter("0.weight"))
    return model


def test_clipping_is_that_of_modelopt() -> None:
    x = torch.randn(48, 8192)  # modelopt looks at 64 rows at most
    samples = CalibrationSet(tuple(f"s/{k}" for k in range(48)), {"x0": x.numpy()}, "", 0)
    module = modelopt.convert(_wide(), weights=["0"], inputs=[])
    modelopt.set_ranges(module, modelopt.weight_ranges(module))
    clip(module, samples, ["x0"], ratios=[1 - 0.05 * step for step in range(1, 11)], samples=48)
    own = modelopt.ranges(module)["0.weight_quantizer"].flatten()
    theirs = _modelopt(_wide(), {"num_bits": 8, "block_sizes": {-1: 8192}}, {"method": "awq_clip"}, x)
    found: Any = theirs.get_submodule("0.weight_quantizer")
    weight = _wide().get_parameter("0.weight").detach()
    wanted = found.amax.flatten()
    assert bool((own < 0.96 * weight.abs().amax(1)).any())
    assert bool((own / wanted).log().abs().max() < 0.06), "one step of 5 % at most: the float16 grid tips close choices"
    assert _result_error(weight, own, x) == pytest.approx(_result_error(weight, wanted, x), rel=0.03)
    assert _result_error(weight, own, x) < 0.97 * _result_error(weight, weight.abs().amax(1), x)


def _result_error(weight: Tensor, amax_C: Tensor, x: Tensor) -> float:
    step = amax_C[:, None] / STEPS
    return float((x @ (torch.clamp(torch.round(weight / step), -128, 127) * step - weight).T).double().square().sum())


def test_quirk_modelopt_does_not_clip_int8_weights_with_one_scale_a_channel() -> None:
    """The reason for clipping ourselves: without `block_sizes` it leaves the largest magnitudes, and says nothing."""
    theirs = _modelopt(_wide(), {"num_bits": 8, "axis": 0}, {"method": "awq_clip"}, torch.randn(48, 8192))
    found: Any = theirs.get_submodule("0.weight_quantizer")
    assert found.amax is None or torch.equal(found.amax.flatten(), _wide().get_parameter("0.weight").abs().amax(1))
