"""More work, a lower clock or a narrower memory never makes anything faster; the band says what it should."""

from __future__ import annotations

from dataclasses import replace
from math import log

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmdeploy.estimate.devices import Device, device, device_file, device_names
from fmdeploy.estimate.fromonnx import work_of
from fmdeploy.estimate.networks.resnet import resnet
from fmdeploy.estimate.networks.vit import vit
from fmdeploy.estimate.roofline import predict, seconds
from fmdeploy.estimate.work import PRECISIONS, Precision, Work

RESNET = work_of(resnet(18).model()).rows
VIT = work_of(vit("small").model()).rows
ON = device("orin-nano-super")
sizes = st.integers(0, 10**9)
works = st.builds(Work, st.just("w"), st.sampled_from(["conv", "depthwise", "gemm", "attention", "norm", "copy"]),
                  sizes, sizes, sizes, sizes)


def test_the_formula_by_hand() -> None:
    work = Work("c", "conv", macs=118_013_952, weights=147_456, reads=401_408, writes=401_408)
    c = ON.constants
    compute = 2 * work.macs * 8 / (c.compute.fp16 * ON.peak["fp16"])
    memory = (147_456 + 8 * 802_816) * 2 / (c.memory * 102.4e9)
    launch = c.launch_us * 1e-6 * 1000 / 1020
    assert seconds(work, ON, "fp16", 8) == pytest.approx(max(compute, memory) + launch, rel=1e-12)


def test_without_overlap_times_add() -> None:
    work = Work("c", "conv", macs=10**9, reads=10**7)
    compute, memory = Work("c", "conv", macs=10**9), Work("c", "conv", reads=10**7)
    alone = [seconds(one, ON, "fp16") - ON.launch for one in (compute, memory)]
    assert seconds(work, replace(ON, overlap=0.0), "fp16") == pytest.approx(sum(alone) + ON.launch)
    assert seconds(work, ON, "fp16") == pytest.approx(max(alone) + ON.launch)


def test_memory_only_kinds_ignore_macs() -> None:
    assert seconds(Work("d", "depthwise", macs=10**12, reads=100), ON, "fp16") == seconds(
        Work("d", "depthwise", reads=100), ON, "fp16")


@settings(max_examples=60, deadline=None)
@given(works, st.sampled_from(PRECISIONS), st.integers(1, 64))
def test_more_is_never_faster(work: Work, precision: Precision, batch: int) -> None:
    time = seconds(work, ON, precision, batch)
    assert time >= ON.launch
    assert seconds(work, ON, precision, batch + 1) >= time
    for name in ("macs", "weights", "reads", "writes"):
        assert seconds(replace(work, **{name: getattr(work, name) + 10**6}), ON, precision, batch) >= time
    slower = replace(ON, bandwidth=ON.bandwidth / 2, peak={p: v / 2 for p, v in ON.peak.items()})
    assert seconds(work, slower, precision, batch) >= time


@settings(max_examples=40, deadline=None)
@given(works, st.integers(1, 64))
def test_less_precise_is_never_slower(work: Work, batch: int) -> None:
    fp32, fp16, int8 = (seconds(work, ON, p, batch) for p in PRECISIONS)
    assert fp32 >= fp16 >= int8


@pytest.mark.parametrize("name", device_names())
def test_a_lower_power_mode_is_slower(name: str) -> None:
    modes = [mode.name for mode in device_file(name).mode]
    rows = [(on := device(name, mode), predict(RESNET, on, "fp16").p50_ms) for mode in modes]
    for one, time in rows:
        for other, other_time in rows:
            if one.peak["fp16"] < other.peak["fp16"] and one.bandwidth <= other.bandwidth and _clock(one) <= _clock(other):
                assert time > other_time


def _clock(on: Device) -> float:
    assert on.clock_mhz is not None
    return on.clock_mhz


def test_a_whole_network_is_the_sum_of_its_kernels() -> None:
    prediction = predict(RESNET, ON, "int8", 4)
    assert prediction.p50_ms == pytest.approx(1e3 * sum(seconds(row, ON, "int8", 4) for row in RESNET))
    assert prediction.low_ms < prediction.p50_ms < prediction.high_ms
    assert {layer.bound for layer in prediction.layers} <= {"compute", "memory", "launch"}


def test_the_band_is_wider_for_transformers_and_outside_the_sizes_of_the_fit() -> None:
    narrow, wide = predict(RESNET, ON, "fp16"), predict(VIT, ON, "fp16")
    assert (narrow.like, wide.like) == ("convolution", "transformer")
    assert log(narrow.high_ms / narrow.p50_ms) == pytest.approx(ON.constants.spread.convolution)
    assert log(wide.high_ms / wide.p50_ms) >= 1.5 * ON.constants.spread.convolution
    huge = predict(RESNET, ON, "fp16", 1024)
    assert huge.widened > 1
    assert huge.high_ms / huge.p50_ms > narrow.high_ms / narrow.p50_ms


def test_int8_leaves_attention_and_norms_in_fp16() -> None:
    layers = predict(VIT, ON, "int8").layers
    assert {layer.precision for layer in layers if layer.work.kind == "gemm"} == {"int8"}
    assert {layer.precision for layer in layers if layer.work.kind in ("attention", "norm")} == {"fp16"}


def test_a_flag_of_the_file_wins_over_the_kind() -> None:
    kept = Work("c", "conv", macs=10**9, int8=False)
    assert seconds(kept, ON, "int8") == seconds(kept, ON, "fp16")
    assert Work("m", "matmul", int8=True).precision("int8") == "int8"
    assert Work("m", "matmul").precision("int8", rest="fp32") == "fp32"
