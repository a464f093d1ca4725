"""How calibration samples are run: fast where the network allows it, and never so that order matters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from fmdeploy.quantize.observe import VALUES, Way, fastest_way, flat, run, spread
from fmdeploy.quantize.ptq import ptq
from support.quantize_nets import Residual, image_net, io_of, samples_of


class _KnowsItsBatch(nn.Module):
    """What a trace with one sample may leave behind."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW.reshape(1, -1).sum(1, keepdim=True)


class _Views(nn.Module):
    """Refuses channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW: Tensor = self.conv(x_BCHW)
        return y_BCHW.view(len(x_BCHW), -1)


class _MixesSamples(nn.Module):
    """Its batch statistics are part of the result, even in evaluation mode."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return (x_BCHW - x_BCHW.mean(0, keepdim=True)).flatten(1)


class _Raises(nn.Module):
    """Says so when it gets more than one sample."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if len(x_BCHW) > 1:
            raise RuntimeError("batch 1 only")
        return x_BCHW.flatten(1)


def _traced(net: nn.Module) -> fx.GraphModule:
    """A graph of one call."""
    root, graph = nn.Module(), fx.Graph()
    root.add_module("net", net)
    graph.output(graph.call_module("net", (graph.placeholder("x_BCHW"),)))
    return fx.GraphModule(root.eval(), graph)


@pytest.mark.parametrize(("net", "batched", "channels_last"), [
    (Residual(), True, True), (_Views(), True, False), (_KnowsItsBatch(), False, False),
    (_MixesSamples(), False, False), (_Raises(), False, False),
])
def test_networks_are_run_in_the_fastest_way_that_changes_nothing(
    net: nn.Module, batched: bool, channels_last: bool
) -> None:
    samples = samples_of(io_of((3, 16, 16), outputs=((4,),)), 11)
    net = _traced(net)
    way = fastest_way(net, samples, ["x0"])
    assert (way.batch > 1, way.channels_last) == (batched, channels_last)
    found = torch.cat([rows for (rows,) in run(net, samples, ["x0"], way)])
    alone = torch.cat([rows for (rows,) in run(net, samples, ["x0"], Way())])
    assert torch.allclose(found, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


class _Branches(nn.Module):
    """Another layer for dark images, which a batch of dark and light ones would hide."""

    def __init__(self) -> None:
        super().__init__()
        self.light, self.dark, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.dark(x_BCHW) if float(x_BCHW.mean()) < 0.1 else self.light(x_BCHW)
        found: Tensor = self.head(torch.relu(y_BCHW).mean((2, 3)))
        return found


def test_a_network_that_branches_on_values_sees_one_sample_at_a_time(capfd: pytest.CaptureFixture[str]) -> None:
    io = io_of((3, 16, 16), outputs=((4,),))
    samples = samples_of(io, 8)
    samples.inputs["x0"][0] *= 0.1  # the example to trace with, and the only dark one
    made = ptq(_Branches(), io, samples, calibrator="max")
    assert made.placement.method == "modules"
    assert set(made.calibration.ranges) == {"dark"}
    assert made.calibration.ranges["dark"].high == samples.inputs["x0"][0].max()
    assert capfd.readouterr().err == "", "torch.export prints its graphs where it fails"


def test_batches_do_not_depend_on_the_order_of_the_samples() -> None:
    net, io = image_net(Residual())
    samples = samples_of(io, 11)
    shuffled = samples.take([3, 9, 1, 0, 10, 2, 8, 5, 4, 7, 6])
    pairs = zip(run(net, samples, ["x0"], Way(4)), run(net, shuffled, ["x0"], Way(4)), strict=True)
    assert all(torch.equal(a, b) for (a,), (b,) in pairs)


def test_spread_takes_the_same_positions_of_every_sample_and_leaves_no_channel_out() -> None:
    channels = torch.arange(48.0).view(1, 48, 1, 1).expand(2, 48, 32, 32).clone()
    for x in (channels, channels.to(memory_format=torch.channels_last)):
        found = spread(flat(x))
        assert found.shape[1] <= VALUES
        assert torch.equal(found[0], found[1])
        assert set(found[0].tolist()) == set(range(48))
        counts = torch.bincount(found[0].long())
        assert counts.min() > 0.8 * counts.max()
    small = torch.rand(3, 100)
    assert torch.equal(spread(flat(small)), small)
    assert spread(flat(torch.rand(3))).shape == (3, 1)
