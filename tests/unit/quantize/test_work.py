"""Kernels of a graph: what is counted, what is fused, whose precision it follows."""

from __future__ import annotations

import torch

from fmdeploy.estimate.devices import device
from fmdeploy.quantize.build import tracing_example
from fmdeploy.quantize.ptq import ptq
from fmdeploy.quantize.work import Kernel, LatencyModel, kernels_of
from support.quantize_nets import NETS, samples_of


def _kernels(case: str) -> dict[str, Kernel]:
    torch.manual_seed(0)
    net, io = NETS[case]()
    made = ptq(net, io, samples_of(io))
    return {kernel.work.name: kernel for kernel in kernels_of(net, made.placement, tracing_example(io))}


def test_a_residual_sum_runs_inside_the_convolution_that_feeds_it() -> None:
    found = _kernels("residual")
    assert list(found) == ["stem", "conv", "add_", "mean", "head"]
    assert (found["add_"].fused, found["add_"].group, found["add_"].work.reads) == (True, "add_", 8 * 256)
    nano = device("orin-nano-super")
    alone = LatencyModel((found["add_"],), nano)
    assert 0 < alone.gain("add_") < 1e6 * nano.launch


def test_attention_products_count_and_stay_float() -> None:
    found = _kernels("vit")
    kinds = {name: kernel.work.kind for name, kernel in found.items()}
    assert kinds["matmul"] == kinds["matmul_1"] == "matmul"
    assert found["matmul"].work.macs == 16 * 16 * 16
    assert found["qkv"].work.macs == 16 * 16 * 48
    assert (kinds["norm1"], kinds["softmax"]) == ("norm", "softmax")
    assert {k.group for k in found.values()} - {""} == {"patch", "qkv", "proj", "up", "down"}
    assert not [name for name in kinds if "gelu" in name or "flatten" in name or "getitem" in name]


def test_grouped_convolutions_are_depthwise_and_transposed_ones_count_their_input() -> None:
    from fmdeploy.tasks.bev_occupancy import BevOccupancy

    task = BevOccupancy()
    net = task.student("depthwise", {}).eval()
    made = ptq(net, task.io, samples_of(task.io, count=2))
    found = {k.work.name: k.work for k in kernels_of(net, made.placement, tracing_example(task.io))}
    depthwise = [work for work in found.values() if work.kind == "depthwise"]
    assert len(depthwise) >= 4
    assert all(work.macs == 9 * work.writes for work in depthwise)
    head = net.get_submodule("head").get_parameter("weight")
    assert found["head"].macs == head.numel() * 32 * 32


def test_without_a_graph_the_layers_are_counted() -> None:
    found = _kernels("untraceable")
    assert {name: k.work.macs for name, k in found.items()} == {"first": 72, "second": 144, "head": 36}
    assert found["head"].group == ""
