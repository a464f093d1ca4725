"""Planted sensitive layers are found, one by one and by the search, and switching is the same as building anew."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fmdeploy.estimate.devices import device
from fmdeploy.models.outputs import predictor
from fmdeploy.quantize.build import tracing_example
from fmdeploy.quantize.groups import Switchboard
from fmdeploy.quantize.placement import Request
from fmdeploy.quantize.placementfile import read_placement, to_toml
from fmdeploy.quantize.ptq import ptq
from fmdeploy.quantize.search import Search, ranking, search
from fmdeploy.quantize.sensitivity import Judge, Sensitivity, measure_sensitivity
from fmdeploy.quantize.trace import as_tuple
from fmdeploy.quantize.work import LatencyModel, kernels_of
from support.planted import CONVS, Chain, Planted, calibration_set, labelled, plant
from support.quantize_nets import NETS, samples_of

TASK = Planted()
SETS = [("second",), ("third", "fourth"), ("first", "fourth")]


@functools.cache
def measured(layers: tuple[str, ...]) -> tuple[Judge, Sensitivity, LatencyModel]:
    """The chain with these layers planted."""
    net = Chain()
    samples = labelled(net)
    for layer in layers:
        plant(net, layer)
    made, example = ptq(net, TASK.io, calibration_set()), tracing_example(TASK.io)
    board = Switchboard.of(made.module, made.placement, net, example, Request())
    judge = Judge(board, TASK, samples, predictor(net, TASK.io))
    latency = LatencyModel(kernels_of(net, made.placement, example), device("orin-nano-super"))
    return judge, measure_sensitivity(judge), latency


@pytest.mark.parametrize("layers", [("second",), ("fourth",)])
def test_leave_one_in_and_leave_one_out_find_the_planted_layer(layers: tuple[str, ...]) -> None:
    _, found, _ = measured(layers)
    assert found.by_noise()[0].name == layers[0]
    rows = {row.name: row for row in found.rows}
    assert set(rows) == set(CONVS)
    for name, row in rows.items():
        assert (row.alone.drop or 0) > 0.2 if name in layers else row.alone.drop == 0
        assert row.without.drop == 0 if name in layers else (row.without.drop or 0) > 0.2
    assert rows[layers[0]].alone.worst_db < 5 < 15 < min(r.alone.worst_db for n, r in rows.items() if n not in layers)


@pytest.mark.parametrize("layers", SETS)
def test_the_search_keeps_exactly_the_planted_layers(layers: tuple[str, ...]) -> None:
    judge, sensitivity, latency = measured(layers)
    found = search(judge, sensitivity, latency, 0.02)
    assert found.reached
    assert found.chosen.keep_float == layers
    assert found.chosen.drop == 0
    assert found.tried[0].keep_float == ()
    assert found.tried[0].drop > 0.2


def test_the_search_gives_back_what_the_order_took_in_vain() -> None:
    """With a useless layer ranked first, the planted one is found behind it, and the useless one returns to INT8."""
    judge, sensitivity, latency = measured(("second",))
    assert ranking(sensitivity, latency)[0] == "second"
    wrong = Sensitivity(sensitivity.metric, sensitivity.samples, sensitivity.everything, tuple(
        row if row.name != "first" else type(row)(row.name, row.kind, type(row.alone)({"logits": -99.0}, 0.9, None, None),
                                                  row.without) for row in sensitivity.rows))
    assert ranking(wrong, latency)[:2] == ["first", "second"]
    found = search(judge, wrong, latency, 0.02)
    assert found.chosen.keep_float == ("second",)
    assert ("first", "second") in [candidate.keep_float for candidate in found.tried]


def test_nothing_is_kept_where_nothing_is_lost() -> None:
    judge, sensitivity, latency = measured(())
    found = search(judge, sensitivity, latency, 0.0)
    assert (found.reached, found.chosen.keep_float) == (True, ())


def test_a_limit_that_no_int8_network_keeps_gives_the_best_there_is() -> None:
    judge, sensitivity, latency = measured(CONVS)
    found = search(judge, sensitivity, latency, 0.0)
    assert not found.reached
    assert found.chosen.int8 > 0
    assert found.chosen.drop == min(c.drop for c in found.tried if c.int8)


def test_the_front_rises_in_latency_and_falls_in_drop_and_survives_json() -> None:
    judge, sensitivity, latency = measured(("third", "fourth"))
    found = search(judge, sensitivity, latency, 0.02)
    front = found.front()
    assert [c.microseconds for c in front] == sorted(c.microseconds for c in front)
    assert [c.drop for c in front] == sorted((c.drop for c in front), reverse=True)
    assert found.chosen in front
    values = found.to_json()
    assert [found.tried[k] for k in values["front"]] == [c for c in found.tried if c in front]
    assert Search.from_json(values) == found
    assert Sensitivity.from_json(sensitivity.to_json()) == sensitivity


@pytest.mark.parametrize("case", ["bev", "residual", "vit", "untraceable"])
def test_switching_a_layer_off_is_building_without_it(case: str) -> None:
    torch.manual_seed(0)
    net, io = NETS[case]()
    made, example = ptq(net, io, samples_of(io)), tracing_example(io)
    board = Switchboard.of(made.module, made.placement, net, example, Request())
    inputs = samples_of(io, seed=5).tensors([spec.name for spec in io.inputs])
    for name in board.names[:: 4 if case == "bev" else 1]:
        rest = [other for other in board.names if other != name]
        fresh = ptq(net, io, samples_of(io), request=Request(keep_float=(name,)))
        with torch.no_grad(), board.only(rest):
            switched = as_tuple(made.module(*inputs))
        with torch.no_grad():
            built = as_tuple(fresh.module(*inputs))
        assert all(torch.equal(a, b) for a, b in zip(switched, built, strict=True)), name
        assert board.quantised(rest) == {row.module for row in fresh.placement.weights} | set(fresh.placement.adds)


@pytest.mark.parametrize("case", ["bev", "residual", "vit"])
def test_a_file_that_wants_all_in_int8_does_not_stop_the_switching(case: str, tmp_path: Path) -> None:
    """A sum whose layers are kept in float follows them, although the file says "int8" of it."""
    net, io = NETS[case]()
    path = tmp_path / "placement.toml"
    path.write_text(to_toml(ptq(net, io, samples_of(io)).placement), encoding="utf-8")
    request = Request(table=read_placement(path))
    made = ptq(net, io, samples_of(io), request=request)
    board = Switchboard.of(made.module, made.placement, net, tracing_example(io), request)
    for name in board.names:
        assert board.quantised((name,)) <= {name}
        assert name not in board.quantised([other for other in board.names if other != name])
    assert board.quantised(()) == set()
    ptq(net, io, samples_of(io), request=replace(request, keep_float=board.names[:1]))


def test_nothing_quantised_is_the_float_network_and_all_switches_return() -> None:
    net, io = NETS["residual"]()
    made, example = ptq(net, io, samples_of(io)), tracing_example(io)
    board = Switchboard.of(made.module, made.placement, net, example, Request())
    inputs = samples_of(io, seed=5).tensors([spec.name for spec in io.inputs])
    with torch.no_grad():
        before = made.module(*inputs)
        with board.only(()):
            assert torch.allclose(made.module(*inputs), net(*inputs), atol=1e-6)
        with board.only(("add_",)):  # a lone sum: no placement would quantise it, but its noise is asked for
            lone = made.module(*inputs)
        assert torch.equal(made.module(*inputs), before)
    assert not torch.equal(lone, before)
    assert not torch.allclose(lone, net(*inputs), atol=1e-6)


def test_latency_sums_over_kernels_and_int8_never_costs_more() -> None:
    _, _, latency = measured(("second",))
    whole, none = latency.microseconds(CONVS), latency.microseconds(())
    assert none - whole == pytest.approx(sum(latency.gain(name) for name in CONVS))
    assert all(latency.gain(name) > 0 for name in CONVS)
    kernels = {kernel.work.name: kernel for kernel in latency.kernels}
    assert kernels["second"].work.macs == 8 * 8 * 9 * 12 * 12
    assert (kernels["second"].work.reads, kernels["second"].work.writes) == (8 * 144, 8 * 144)
    assert kernels["head"].group == ""
