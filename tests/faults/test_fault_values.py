"""Values and memory of a frame (T6 to T9, T11, T15): content is the sensor's fault, so the frame says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fmdeploy.arrays import Array
from fmdeploy.errors import FrameError
from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.runtime import GuardConfig, Reason, open_bundle
from fmdeploy.runtime.backends.onnxrt import OrtBackend
from fmdeploy.runtime.guards.content import Guards
from support.bundles import Arrays, run_model
from support.fdti import Fdti
from support.guards import guards_of, known, pictures, reasons
from support.runtimes import frame, runtime, toy_bundle

TIERS = ("fp32", "int8-cpu")
COLOURS = IOSpec(
    inputs=(TensorSpec(name="image", shape=(3, 32, 32), layout="CHW", value_range=(0, 1), channels=("R", "G", "B")),),
    outputs=(TensorSpec(name="y", shape=(1,)),), preprocessing="none")
BYTES = COLOURS.model_copy(update={
    "inputs": (COLOURS.inputs[0].model_copy(update={"value_range": (0.0, 255.0)}),)})


def clean() -> None:
    """The control of every row here: fifty good frames, no alarm."""
    target = runtime()
    assert [target.infer(frame(seed)).reasons for seed in range(50)] == [()] * 50


@pytest.mark.parametrize("tier", TIERS)
def test_T6_NaN_and_infinity(tier: str, fdti: Fdti) -> None:
    target = runtime(tier)
    for value in (np.nan, np.inf, -np.inf):
        for where in (slice(5, 6), slice(-1, None), slice(None, None, 10), slice(None)):
            bad = frame()
            bad["camera"].reshape(-1)[where] = value
            with fdti.detecting(f"{value} in {tier}"):
                found = target.infer(bad)
            assert found.reasons == (Reason.NOT_FINITE,)
            assert not found.valid
            assert found.outputs == {}
            assert "camera" in found.findings[0].detail
    with pytest.raises(FrameError, match="NOT_FINITE camera"):
        found.require_valid()


def test_T6_every_single_value_is_looked_at() -> None:
    """No sampling here: a NaN anywhere, in any input, is found in the very frame."""
    guards = guards_of()
    good = frame()
    for name, array in good.items():
        flat = array.reshape(-1)
        for at in range(0, flat.size, 7):
            kept, flat[at] = flat[at], np.nan
            assert reasons(guards, good) == [Reason.NOT_FINITE], (name, at)
            flat[at] = kept


def test_T6_control_INT8_alone_launders_the_NaN() -> None:
    """Why the guard stands before the model and not behind it."""
    bundle = open_bundle(toy_bundle())
    bad = {name: np.full((1, *array.shape), np.nan, np.float32) for name, array in frame().items()}
    assert np.isfinite(run_model(bundle.model_bytes("int8-cpu"), bad)["bev"]).all()
    assert np.isnan(run_model(bundle.model_bytes("fp32"), bad)["bev"]).all()
    clean()


@pytest.mark.parametrize("value", [255.0, 1.001, -0.001, -1.0])
def test_T7_out_of_range(value: float, fdti: Fdti) -> None:
    bad, target = frame(), runtime()
    bad["lidar"][3, 4, 5] = value
    with fdti.detecting():
        found = target.infer(bad)
    assert found.reasons == (Reason.OUT_OF_RANGE,)
    assert "expected 0..1" in found.findings[0].detail
    assert found.outputs == {}


def test_T7_0_to_255_where_0_to_1_is_expected_and_the_inverse() -> None:
    images = pictures(64)
    unit, byte = guards_of(COLOURS, {"image": images}), guards_of(BYTES, {"image": 255 * images})
    fresh = pictures(8, seed=1)
    for image in fresh:
        assert reasons(unit, {"image": 255 * image}) == [Reason.OUT_OF_RANGE]
        found = set(reasons(byte, {"image": image}))
        assert found == {Reason.OUT_OF_DISTRIBUTION}, "in range, but nothing like 0..255"


def test_T7_control_the_ends_of_the_range_and_the_right_scale() -> None:
    good = frame()
    good["lidar"][0, 0, :3] = (0.0, -0.0, 1.0)
    assert runtime().infer(good).valid
    byte = guards_of(BYTES, {"image": 255 * pictures(64)})
    assert [reasons(byte, {"image": 255 * image}) for image in pictures(50, seed=1)] == [[]] * 50


def test_T8_swapped_colours(fdti: Fdti) -> None:
    guards = guards_of(COLOURS, {"image": pictures(64)})
    for image in pictures(8, seed=1):
        swapped = np.ascontiguousarray(image[::-1])
        with fdti.detecting("BGR for RGB"):
            found = guards.before({"image": swapped}).findings
        assert {finding.code for finding in found} == {Reason.OUT_OF_DISTRIBUTION}
        assert any("mean of R is " in finding.detail for finding in found), found


def test_T8_swapped_colours_change_the_golden_outputs() -> None:
    """What the statistics may miss, the golden test does not: other channels, other outputs."""
    bundle = open_bundle(toy_bundle())
    golden = bundle.golden.sample(0)
    batch = {name: array[None] for name, array in golden.items()}
    swapped = {**batch, "camera": np.ascontiguousarray(batch["camera"][:, ::-1])}
    expected = bundle.golden.outputs["fp32"]["bev"][:1]
    model = bundle.model_bytes("fp32")
    assert np.allclose(run_model(model, batch)["bev"], expected, atol=1e-5)
    assert not np.allclose(run_model(model, swapped)["bev"], expected, atol=1e-2)


def test_T8_control_right_colours_raise_no_alarm() -> None:
    guards = guards_of(COLOURS, {"image": pictures(64)})
    assert [reasons(guards, {"image": image}) for image in pictures(100, seed=1)] == [[]] * 100


@pytest.mark.parametrize("fill", [0.0, 1.0, 0.3, "one colour"])
def test_T9_picture_without_information(fill: Any, fdti: Fdti) -> None:
    bad, target = frame(), runtime()
    bad["camera"][:] = np.linspace(0.1, 0.9, 12, dtype=np.float32)[:, None, None] if fill == "one colour" else fill
    with fdti.detecting():
        found = target.infer(bad)
    assert Reason.LOW_INFORMATION in found.reasons
    assert not found.valid
    assert "camera: every channel is constant" in [finding.detail for finding in found.findings]


def test_T9_control_a_constant_channel_is_no_fault() -> None:
    good = frame()
    good["camera"][:11] = 0  # nothing in sight but one vehicle
    good["camera"][11] = 0
    good["camera"][11, 9, 9] = 1
    assert Reason.LOW_INFORMATION not in runtime().infer(good).reasons
    clean()


ORDERS: dict[str, Callable[[Array], Array]] = {"Fortran": np.asfortranarray, "negative strides": lambda x: np.ascontiguousarray(x[::-1])[::-1],
          "strided": lambda x: np.repeat(x, 2, axis=0)[::2],
          "not owned": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape)}


@pytest.mark.parametrize("case", ORDERS)
def test_T11_odd_memory_gives_the_same_result(case: str, fdti: Fdti) -> None:
    good, target = frame(), runtime(guards=GuardConfig(frozen_after=0))
    expected = target.infer(good).outputs["bev"]
    odd = {name: ORDERS[case](array) for name, array in good.items()}
    with fdti.detecting("copied once"):
        found = target.infer(odd)
    assert np.array_equal(found.outputs["bev"], expected)
    bad = {**odd, "lidar": ORDERS[case](np.full_like(good["lidar"], np.nan))}
    assert target.infer(bad).reasons == (Reason.NOT_FINITE,)


def test_T11_one_buffer_however_many_copies() -> None:
    """The copy is bounded: every frame of a foreign array goes through the same memory."""
    guards = guards_of()
    feeds = [guards.before({name: np.asfortranarray(array) for name, array in frame(seed).items()}).feeds
             for seed in range(3)]
    assert all(found is not None and np.shares_memory(found["lidar"], feeds[0]["lidar"]) for found in feeds)  # type: ignore[index]
    assert np.array_equal(feeds[2]["lidar"][0], frame(2)["lidar"])  # type: ignore[index]


def test_T11_control_usual_memory_is_used_in_place_and_untouched() -> None:
    good = frame()
    before = {name: array.copy() for name, array in good.items()}
    for array in good.values():
        array.flags.writeable = False
    assert runtime().infer(good).valid
    assert all(np.array_equal(good[name], before[name]) for name in good)
    feeds = guards_of().before(good).feeds
    assert feeds is not None
    assert np.shares_memory(feeds["lidar"], good["lidar"])


def gather() -> tuple[OrtBackend, Guards]:
    """A model that takes an index, guarded by the range of valid ones."""
    io = IOSpec(inputs=(TensorSpec(name="index", dtype="int64", shape=(4,), value_range=(0, 9)),),
                outputs=(TensorSpec(name="y", shape=(4, 2)),), preprocessing="none")
    table = onnx.numpy_helper.from_array(np.arange(20, dtype=np.float32).reshape(10, 2), "table")
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "index"], ["y"])], "g",
        [helper.make_tensor_value_info("index", TensorProto.INT64, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 2])], [table])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    calibration = {"index": np.random.default_rng(0).integers(0, 10, (64, 4))}
    statistics = {"index": known({"index": calibration["index"][:, :, None, None].astype(np.float32)})["index"]}
    whole = statistics["index"].model_copy(update={"channel_mean": (4.5,), "channel_std": (1.5,)})
    return OrtBackend(model.SerializeToString(), io), Guards(io, {"index": whole}, GuardConfig(frozen_after=0))


def test_T15_index_out_of_range(fdti: Fdti) -> None:
    _, guards = gather()
    with fdti.detecting():
        found = guards.before({"index": np.array([1, 2, 3, 10])})
    assert found.feeds is None
    assert [finding.code for finding in found.findings] == [Reason.OUT_OF_RANGE]


def test_T15_control_valid_indices_run_and_the_model_alone_raises() -> None:
    backend, guards = gather()
    found = guards.before({"index": np.array([0, 2, 3, 9])})
    assert found.findings == []
    assert found.feeds is not None
    assert backend.run(found.feeds)[0][0, :, 0].tolist() == [0, 4, 6, 18]
    with pytest.raises(Exception, match="out of data bounds"):
        backend.run({"index": np.array([[1, 2, 3, 10]])})


def test_vectors_and_small_integers_are_guarded_too() -> None:
    speed = TensorSpec(name="speed", shape=(3,), value_range=(-50.0, 50.0))
    image = TensorSpec(name="image", dtype="uint8", shape=(3, 4, 4), layout="CHW")
    io = IOSpec(inputs=(speed, image), outputs=(TensorSpec(name="y", shape=(1,)),), preprocessing="none")
    batch = known({"image": np.zeros((2, 3, 1, 1), np.float32)})
    statistics = {
        "speed": batch["image"].model_copy(update={
            "channel_mean": (10.0,), "channel_std": (5.0,), "energy_mean": (), "energy_std": ()}),
        "image": batch["image"].model_copy(update={
            "channel_mean": (127.0,) * 3, "channel_std": (20.0,) * 3, "min": 0.0, "max": 255.0})}
    guards = Guards(io, statistics, GuardConfig(frozen_after=0, every_channel=True))
    pixels = np.random.default_rng(0).integers(0, 255, size=(3, 4, 4), dtype=np.uint8)
    for values, expected in (
        ([1.0, 20.0, 9.0], []),
        ([1.0, np.nan, 9.0], [Reason.NOT_FINITE]),
        ([1.0, 51.0, 9.0], [Reason.OUT_OF_RANGE]),
        ([1.0, -51.0, 9.0], [Reason.OUT_OF_RANGE]),
        ([-49.0, -50.0, -48.0], [Reason.UNUSUAL_INPUT]),
        ([9.0, 9.0, 9.0], [Reason.LOW_INFORMATION]),
    ):
        given: Arrays = {"speed": np.array(values, np.float32), "image": pixels}
        guards.structure(given, None)
        assert reasons(guards, given) == expected, values
