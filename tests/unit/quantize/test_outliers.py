"""The outlier probe: what it measures, what it holds in float, and what that is worth."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fmdeploy.evaluate.sqnr import sqnr_db
from fmdeploy.iospec import IOSpec
from fmdeploy.quantize.build import build
from fmdeploy.quantize.outliers import (
    EXACT_DB,
    MIN_READER_DB,
    POSITIONS,
    SAMPLES,
    Seen,
    columns_of,
    probe_graph,
    reader_db,
    spread,
)
from fmdeploy.quantize.placement import Placement, Request, Table, Wish
from fmdeploy.quantize.ptq import ptq
from fmdeploy.quantize.trace import float_graph
from support.quantize_nets import Residual, SmallViT, image_net, samples_of, untraceable


def test_the_readers_sqnr_has_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    values_CP = torch.rand(4, 4000, generator=generator) * 2 - 1  # uniform: variance 1/3, step 1/127, noise step² / 12
    expected = 10 * np.log10((1 / 3) / ((1 / 127) ** 2 / 12))
    alike_C = torch.ones(4)
    assert reader_db(values_CP, 1.0, alike_C) == pytest.approx(expected, abs=0.2)
    assert reader_db(values_CP, 16.0, alike_C) == pytest.approx(expected - 20 * np.log10(16), abs=0.5)
    values_CP[0] *= 100
    assert reader_db(values_CP, 100.0, alike_C) == pytest.approx(expected - 6, abs=0.5), "it reads the large one: fine"
    only_small_C = torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert reader_db(values_CP, 100.0, only_small_C) == pytest.approx(expected - 40, abs=1)


def test_the_estimate_is_what_the_layer_really_gets() -> None:
    torch.manual_seed(0)
    for layer, x in ((nn.Linear(16, 32, bias=False), torch.randn(1, 500, 16)),
                     (nn.Conv2d(16, 32, 3, groups=2, bias=False), torch.randn(1, 16, 24, 24)),
                     (nn.Conv2d(16, 16, 3, groups=16, bias=False), torch.randn(1, 16, 24, 24))):
        axis = 2 if isinstance(layer, nn.Linear) else 1
        x = x * torch.logspace(-1, 1, 16).reshape([16 if k == axis else 1 for k in range(x.ndim)])
        scale = float(x.abs().max()) / 127
        with torch.no_grad():
            real = sqnr_db(layer(x).numpy(), layer(torch.round(x / scale) * scale).numpy())
        values_CP = x.movedim(axis, 0).reshape(16, -1)
        assert reader_db(values_CP, 127 * scale, columns_of(layer)) == pytest.approx(real, abs=0.6)


def test_sparse_inputs_and_dead_channels_are_no_outliers() -> None:
    sparse_CP = (torch.rand(8, 5000, generator=torch.Generator().manual_seed(0)) < 0.002).float()
    assert reader_db(sparse_CP, 1.0, torch.ones(8)) == EXACT_DB
    assert reader_db(torch.zeros(3, 10), 0.0, torch.ones(3)) == EXACT_DB


def test_a_constant_outlier_carries_no_information() -> None:
    values_CP = torch.randn(64, 2048, generator=torch.Generator().manual_seed(0))
    values_CP[0] = 1000.0
    assert reader_db(values_CP, 1000.0, torch.ones(64)) < 3
    assert reader_db(values_CP * 0.01 + 1, 1.04, torch.ones(64)) > 40, "all at one constant: nothing is drowned"


def test_few_large_channels_show_where_ratios_of_the_whole_tensor_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    values_CP, column_C = torch.randn(64, 2048, generator=generator), torch.ones(64)
    values_CP[:2] *= 500
    column_C[:2] /= 500**2
    seen = Seen()
    for part in torch.split(values_CP, POSITIONS, dim=1):
        seen.note(part.reshape(1, 64, POSITIONS), 1)
    row = seen.row("x", float(values_CP.abs().max()), [column_C])
    assert row.max / row.p999 < 2, "two channels of 64 are more than a thousandth of the values"
    assert row.max / row.rms < 30, "the large channels are the root mean square"
    assert row.reader_db < 3 < MIN_READER_DB
    assert row.rms == pytest.approx(float(values_CP.square().mean().sqrt()), rel=1e-5)


def test_the_probe_runs_a_bounded_number_of_samples() -> None:
    net, io = image_net(Residual())
    calibration_set = samples_of(io, 200)
    graph = float_graph(net, calibration_set.tensors(["x0"], slice(0, 1)))
    seen = probe_graph(graph, ["relu"], calibration_set, ["x0"])
    assert {len(found.values) for found in seen.values()} == {SAMPLES}
    assert {found.values[0].shape[1] for found in seen.values()} == {POSITIONS}
    assert set(seen) == {"relu", "add_"}, "what was asked for, and every sum"
    assert spread(200)[0] == 0
    assert np.ptp(np.diff(spread(200))) <= 1
    assert spread(3) == [0, 1, 2]


def _planted_vit(factor: float) -> tuple[nn.Module, IOSpec]:
    """One channel behind the first LayerNorm scaled up, and the Linear that reads it scaled down: the same function."""
    torch.manual_seed(0)
    net, io = image_net(SmallViT())
    with torch.no_grad():
        for parameter in net.get_submodule("norm1").parameters():
            parameter[0] *= factor
        net.get_parameter("qkv.weight")[:, 0] /= factor
    return net, io


def _db(net: nn.Module, io: IOSpec, request: Request = Request()) -> tuple[float, Placement]:  # noqa: B008
    quantised = ptq(net, io, samples_of(io), request=request)
    x_BCHW = samples_of(io, seed=5).tensors(["x0"])
    with torch.no_grad():
        return sqnr_db(net(*x_BCHW).numpy(), quantised.module(*x_BCHW).numpy()), quantised.placement


def test_a_linear_behind_outliers_stays_float_and_says_the_numbers() -> None:
    plain, io = _planted_vit(1.0)
    planted, _ = _planted_vit(512.0)
    x_BCHW = samples_of(io).tensors(["x0"])
    with torch.no_grad():
        torch.testing.assert_close(plain(*x_BCHW), planted(*x_BCHW), rtol=1e-3, atol=1e-4)
    everything = Table({"qkv": Wish("int8")}, {}, "edited.toml")
    (clean, before), (probed, after), (obeyed, forced) = (
        _db(plain, io), _db(planted, io), _db(planted, io, Request(table=everything)))
    assert "qkv" in {row.module for row in before.weights}
    why = {row.name: row.why for row in after.floats}["qkv"]
    assert why.startswith("outliers in norm1: max ")
    assert "max/rms" in why
    assert "dB in INT8" in why
    assert "qkv" in {row.module for row in forced.weights}, "the file's word is final"
    assert probed > obeyed + 6, (clean, probed, obeyed)
    assert probed > clean - 3, (clean, probed, obeyed)


def test_the_residual_maxima_are_printed_before_what_is_held(capsys: pytest.CaptureFixture[str]) -> None:
    net, io = _planted_vit(512.0)
    build(net, samples_of(io), ["x0"])
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == "outlier probe: the largest of 3 sums"
    maxima = [float(line.split("max ")[1].split(",")[0]) for line in lines[1:4]]
    assert maxima == sorted(maxima, reverse=True)
    assert lines[4].startswith("qkv stays in float: outliers in norm1: max ")


class Stream(nn.Module):
    """A convolutional residual stream whose channel 0 is far larger than the others, when planted."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.first, self.second = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8))
        self.last, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = torch.relu(self.enter(x_BCHW))
        x_BCHW = torch.relu(x_BCHW + self.second(torch.relu(self.first(x_BCHW))))
        y_BC: Tensor = self.head(torch.relu(self.last(x_BCHW)).mean((2, 3)))
        return y_BC

    @torch.no_grad()
    def plant(self, factor: float) -> Stream:
        for writer in (self.enter, self.second):
            writer.weight[0] *= factor
            if writer.bias is not None:
                writer.bias[0] *= factor
        for reader in (self.first, self.last):
            reader.weight[:, 0] /= factor
        return self


def test_a_residual_sum_with_outliers_and_all_that_reads_it_stay_float() -> None:
    torch.manual_seed(0)
    net, io = image_net(Stream())
    planted = copy.deepcopy(net)
    assert isinstance(planted, Stream)
    _, before = _db(net, io)
    assert before.adds == ("add",)
    probed, after = _db(planted.plant(1000.0), io)
    assert after.adds == ()
    assert {row.module for row in after.weights} == {"enter", "second"}
    assert not {t for row in after.activations for t in row.tensors} & {"relu", "second", "add", "relu_2"}, \
        "what is left writes float"
    table = Table({name: Wish("int8") for name in ("first", "last", "add")}, {}, "edited.toml")
    forced, _ = _db(planted, io, Request(table=table))
    assert probed > forced + 10, (probed, forced)


def test_single_modules_are_probed_at_their_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    net, io = untraceable()
    calibration_set = samples_of(io)
    calibration_set.inputs["x0"][:, 0] *= 4000
    with torch.no_grad():
        net.get_parameter("first.weight")[:, 0] /= 4000
    _, placement = build(net, calibration_set, ["x0"])
    assert placement.method == "modules"
    assert [row.module for row in placement.weights] == ["second"]
    assert "first stays in float: outliers in input of first: max " in capsys.readouterr().err
    assert {row.tensor for row in placement.measured} == {"input of first", "input of second"}


def test_measured_numbers_survive_the_artifact() -> None:
    net, io = image_net(Residual())
    _, placement = build(net, samples_of(io), ["x0"])
    assert placement.measured
    again = Placement.from_json(placement.to_json())
    assert again == placement
    assert again != replace(placement, measured=())
