"""This machine's CPU as a device: the same model, with peaks that are measured when it is asked.

Short ONNX Runtime graphs on one thread give the speed of matrix products and convolutions, of the kinds of memory-only
operators, and the cost of one more node; numpy gives the read bandwidth. The fastest of many runs counts, which other
load disturbs least. It takes about two seconds. The point is to check the method on a device that is at hand.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from fmdeploy.estimate.constants import Constants, Efficiency, Seen, Spread
from fmdeploy.estimate.devices import Device
from fmdeploy.estimate.fusion import ORT, ORT_INT8, Rules
from fmdeploy.estimate.networks.sketch import IR_VERSION, OPSET, Sketch
from fmdeploy.estimate.work import Precision
from fmdeploy.onnxfile.session import cpu_session

THIS_CPU = "this-cpu"
CPU_RULES: dict[Precision, Rules] = {"fp32": ORT, "fp16": ORT, "int8": ORT_INT8}
BUDGET = 0.06  # seconds of each measurement
MAP, TOKENS = (1, 64, 56, 56), (1, 197, 384)
BYTES_READ = 64 * 2**20
CHAIN = 200  # nodes
WITHIN = 0.25  # half-width of the band, ln

KINDS: dict[str, tuple[tuple[int, ...], Callable[[Sketch], str]]] = {
    "depthwise": ((1, 144, 56, 56), lambda net: net.conv("input", 144, 3, groups=144)),
    "pointwise": (MAP, lambda net: net.scale("input", 0.5)),
    "transcendental": ((1, 197, 1536), lambda net: net.act("input", "gelu")),
    "softmax": ((1, 6, 197, 197), lambda net: net.softmax("input")),
    "norm": (TOKENS, lambda net: net.norm("input")),
    "pool": ((1, 64, 112, 112), lambda net: net.max_pool("input", 3, 2)),
    "resize": ((1, 64, 28, 28), lambda net: net.resize("input")),
    "copy": ((1, 197, 6, 64), lambda net: net.transpose("input", (0, 2, 1, 3))),
}


@cache
def this_cpu_device(precision: Precision = "fp32") -> Device:
    """Measure this CPU; INT8 only where it is asked for."""
    launch, peak = node_cost(), product_peak()
    int8 = int8_peak() if precision == "int8" else peak
    rates = {kind: _rate(shape, build, launch) for kind, (shape, build) in KINDS.items()}
    constants = Constants(
        source="measured at start", memory=1.0, launch_us=launch * 1e6, compute=Efficiency(fp32=1, fp16=1, int8=1),
        spread=Spread(convolution=WITHIN, transformer=WITHIN), seen_gmac=Seen(low=0.05, high=30))
    bandwidth = read_bandwidth()
    return Device(THIS_CPU, "1 thread", {"fp32": peak, "fp16": peak, "int8": int8}, bandwidth, constants,
                  title="the CPU of this machine", confidence="computed", rest="fp32", rates=rates,
                  overlap=overlap(peak, bandwidth))


def node_cost() -> float:
    """Seconds that ONNX Runtime spends on a node that does nothing."""
    return (_fastest(_chain(CHAIN)) - _fastest(_chain(1))) / (CHAIN - 1)


def product_peak() -> float:
    """Operations a second of FP32 convolutions and matrix products in their usual sizes; their geometric mean."""
    shapes: tuple[tuple[tuple[int, ...], Callable[[Sketch], str]], ...] = (
        ((1, 128, 28, 28), lambda net: net.conv("input", 128, 3)),
        ((1, 256, 28, 28), lambda net: net.conv("input", 256)),
        (TOKENS, lambda net: net.linear("input", 1536)))
    speeds = []
    for shape, build in shapes:
        net = Sketch("product", shape, 0)
        out = build(net)
        macs = prod(net.shape(out)) * net.parameters // net.shape(out)[1 if len(shape) == 4 else 2]
        speeds.append(2 * macs / _fastest(net.model()))
    return float(np.exp(np.mean(np.log(speeds))))


def int8_peak(channels: int = 128, side: int = 28) -> float:
    """Operations a second of an INT8 convolution (unsigned activations, signed weights)."""
    weight = np.random.default_rng(0).integers(-127, 128, (channels, channels, 3, 3), dtype=np.int8)
    constants = {"w": weight, "s": np.float32(0.1), "sw": np.full(channels, 0.01, np.float32), "z": np.uint8(0),
                 "zw": np.zeros(channels, np.int8)}
    shape = (1, channels, side, side)
    node = helper.make_node("QLinearConv", ["input", "s", "z", "w", "sw", "zw", "s", "z"], ["output"], pads=[1] * 4)
    graph = helper.make_graph(
        [node], "int8", [helper.make_tensor_value_info("input", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("output", TensorProto.UINT8, shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    return 2 * prod(shape) * channels * 9 / _fastest(model)


def overlap(peak: float, bandwidth: float, channels: int = 16, out: int = 96, side: int = 112) -> float:
    """How much of its memory traffic a convolution hides, found with one that has about as much of either."""
    net = Sketch("overlap", (1, channels, side, side), 0)
    net.conv("input", out)
    compute = 2 * channels * out * side * side / peak
    memory = 4 * (channels + out) * side * side / bandwidth
    return min(max((compute + memory - _fastest(net.model())) / min(compute, memory), 0.0), 1.0)


def read_bandwidth() -> float:
    """Bytes a second that one thread reads from memory."""
    data = np.ones(BYTES_READ // 8, np.int64)
    return BYTES_READ / _least(lambda: data.max())


def _rate(shape: tuple[int, ...], build: Callable[[Sketch], str], launch: float) -> float:
    """Elements read and written a second."""
    net = Sketch("rate", shape, 0)
    out = build(net)
    return (prod(shape) + prod(net.shape(out))) / max(_fastest(net.model()) - launch, 1e-7)


def _chain(length: int) -> ModelProto:
    net = Sketch("chain", (1, 8), 0)
    x = "input"
    for index in range(length):
        x = net.node("Abs" if index % 2 else "Neg", [x], (1, 8))
    return net.model()


def _fastest(model: ModelProto) -> float:
    session = cpu_session(model.SerializeToString())
    feeds = {one.name: _values(tuple(one.shape), one.type) for one in session.get_inputs()}
    return _least(lambda: session.run(None, feeds))


def _values(shape: tuple[int, ...], kind: str) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(0)
    return random.integers(0, 255, shape, np.uint8) if "uint8" in kind else random.standard_normal(shape, np.float32)


def _least(run: Callable[[], object]) -> float:
    """Seconds of the fastest of the runs that fit into the budget."""
    run()
    best, end = float("inf"), time.perf_counter() + BUDGET
    while time.perf_counter() < end:
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best
