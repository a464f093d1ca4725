"""Bad frames (faults.md section 6): every guard trips on its fault and stays quiet on a good frame."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmdeploy.errors import FrameError
from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.runtime import GuardConfig, Reason, Runtime, open_bundle
from fmdeploy.runtime.bundle import InputStatistics
from fmdeploy.runtime.guards.content import Guards
from support.bundles import Arrays, run_model
from support.runtimes import frame, runtime, toy_bundle

TIERS = ("fp32", "int8-cpu")


class Sub(np.ndarray[Any, Any]):
    """A subclass that could do anything."""


def _mapped(tmp: Path, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    path = tmp / "x.bin"
    array.tofile(path)
    with path.open("r+b") as stream:
        return np.frombuffer(mmap.mmap(stream.fileno(), 0), np.float32).reshape(array.shape)


# T1, T2, T3, T5, T12, T13: structure is the caller's mistake, so it raises.
STRUCTURE: dict[str, tuple[Any, str]] = {
    "float64": (lambda x: x.astype(np.float64), "wrong dtype; nothing is cast silently .*found float64"),
    "float16": (lambda x: x.astype(np.float16), "wrong dtype"),
    "uint8": (lambda x: x.astype(np.uint8), "wrong dtype"),
    "int64": (lambda x: x.astype(np.int64), "wrong dtype"),
    "bool": (lambda x: x.astype(bool), "wrong dtype"),
    "object": (lambda x: x.astype(object), "wrong dtype"),
    "big endian": (lambda x: x.astype(">f4"), "wrong byte order .*found >f4"),
    "batch axis": (lambda x: x[None], "batch axis of 1, give one frame"),
    "batch of 2": (lambda x: np.stack([x, x]), "batch axis of 2"),
    "batch of 0": (lambda x: x[None][:0], "batch axis of 0"),
    "rank 2": (lambda x: x[0], r"wrong shape .*expected .*\(8, 16, 16\) CHW, found .*\(16, 16\)"),
    "wrong height": (lambda x: np.ascontiguousarray(x[:, :15]), "wrong shape"),
    "channels last": (lambda x: np.ascontiguousarray(x.transpose(1, 2, 0)), "looks channels-last"),
    "list": (lambda x: x.tolist(), "not a plain numpy array .*found builtins.list"),
    "None": (lambda x: None, "found builtins.NoneType"),
    "number": (lambda x: 0.5, "found builtins.float"),
    "subclass": (lambda x: x.view(Sub), "not a plain numpy array .*Sub"),
    "masked": (lambda x: np.ma.masked_array(x, mask=x > 0), "MaskedArray"),
}


@pytest.mark.parametrize("case", STRUCTURE)
def test_wrong_structure_is_one_clear_error(case: str) -> None:
    change, message = STRUCTURE[case]
    good, target = frame(), runtime()
    with pytest.raises(FrameError, match=message) as caught:
        target.infer({**good, "lidar": change(good["lidar"])})
    assert "\n" not in str(caught.value)
    assert "'lidar'" in str(caught.value)
    assert caught.value.exit_code == 2
    assert target.infer(good).valid, "a refused frame must not harm the next one"


def test_memory_maps_are_refused(tmp_path: Path) -> None:
    good = frame()
    good["lidar"].tofile(tmp_path / "m.bin")
    mapped = np.memmap(tmp_path / "m.bin", np.float32, "r", shape=(8, 16, 16))
    with pytest.raises(FrameError, match="memmap"):
        runtime().infer({**good, "lidar": mapped})
    with pytest.raises(FrameError, match="view of a memory-mapped file"):
        runtime().infer({**good, "lidar": np.asarray(mapped)[:]})
    with pytest.raises(FrameError, match="view of a memory-mapped file"):
        runtime().infer({**good, "lidar": _mapped(tmp_path, good["lidar"])})


@pytest.mark.parametrize("inputs", [{}, {"lidar": frame()["lidar"]}, {**frame(), "radar": frame()["lidar"]}],
                         ids=["empty", "missing", "extra"])
def test_names_must_be_exact(inputs: Arrays) -> None:
    with pytest.raises(FrameError, match=r"exactly the inputs .*expected \['camera', 'lidar'\]"):
        runtime().infer(inputs)


def test_frame_must_be_a_dict() -> None:
    with pytest.raises(FrameError, match="a frame is a dict"):
        runtime().infer(frame()["lidar"])  # type: ignore[arg-type]


# T4
def test_ambiguous_shape_needs_a_layout() -> None:
    bundle = open_bundle(toy_bundle())
    spec = bundle.io.inputs[0].model_copy(update={"shape": (16, 16, 16)})
    cube = bundle.io.model_copy(update={"inputs": (spec,)})
    statistics = {"lidar": bundle.statistics["lidar"].model_copy(
        update={"channel_mean": (0.2,) * 16, "channel_std": (0.1,) * 16})}
    guards = Guards(cube, statistics, GuardConfig())
    frame_16 = {"lidar": np.zeros((16, 16, 16), np.float32)}
    with pytest.raises(FrameError, match="any axis could be the channels"):
        guards.structure(frame_16, None)
    with pytest.raises(FrameError, match="expected CHW, found HWC"):
        guards.structure(frame_16, {"lidar": "HWC"})
    guards.structure(frame_16, {"lidar": "CHW"})


def test_a_layout_that_is_given_must_be_right() -> None:
    """Also where the shape alone would do: the caller believes something that is not so."""
    target = runtime()
    with pytest.raises(FrameError, match=r"'lidar': has the wrong layout \(expected CHW, found HWC\)"):
        target.infer(frame(), layouts={"lidar": "HWC"})
    with pytest.raises(FrameError, match="a layout is given for an input that io.json lacks"):
        target.infer(frame(), layouts={"lider": "CHW"})
    assert target.infer(frame(), layouts={"lidar": "CHW"}).valid


def test_vectors_and_integers_are_guarded_too() -> None:
    speed = TensorSpec(name="speed", shape=(3,), value_range=(-50.0, 50.0))
    image = TensorSpec(name="image", dtype="uint8", shape=(3, 4, 4), layout="CHW")
    io = IOSpec(inputs=(speed, image), outputs=(TensorSpec(name="y", shape=(1,)),), preprocessing="none")
    statistics = {"speed": InputStatistics(channel_mean=(10.0,), channel_std=(5.0,)),
                  "image": InputStatistics(channel_mean=(100.0,) * 3, channel_std=(20.0,) * 3, min=0, max=255)}
    guards = Guards(io, statistics, GuardConfig())
    pixels = np.random.default_rng(0).integers(0, 255, size=(3, 4, 4), dtype=np.uint8)
    for values, fatal, doubts in (
        ([1.0, 20.0, 9.0], [], []),
        ([1.0, np.nan, 9.0], [Reason.NOT_FINITE], None),
        ([1.0, 51.0, 9.0], [Reason.OUT_OF_RANGE], None),
        ([1.0, -51.0, 9.0], [Reason.OUT_OF_RANGE], None),
        ([-49.0, -50.0, -48.0], [], [Reason.UNUSUAL_INPUT]),
    ):
        frame_now: Arrays = {"speed": np.array(values, np.float32), "image": pixels}
        guards.structure(frame_now, None)
        owned = guards.own(frame_now)
        feeds = guards.feeds(owned)
        assert feeds["speed"].shape == (1, 3)
        assert np.array_equal(feeds["image"][0], pixels)
        assert [found.code for found in guards.fatal(owned)] == fatal
        if doubts is not None:
            assert [found.code for found in guards.doubts(owned)] == doubts


# T6
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("share", ["one", "a tenth", "all"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_is_caught_before_quantisation(tier: str, share: str, value: float) -> None:
    bad = frame()
    flat = bad["camera"].reshape(-1)
    flat[{"one": slice(5, 6), "a tenth": slice(None, None, 10), "all": slice(None)}[share]] = value
    found = runtime(tier).infer(bad)
    assert found.reasons == (Reason.NOT_FINITE,)
    assert not found.valid
    assert found.outputs == {}
    assert "camera" in found.findings[0].detail
    with pytest.raises(FrameError, match="NOT_FINITE camera"):
        found.require_valid()


def test_int8_alone_would_have_laundered_the_nan() -> None:
    """The control: why the guard stands before the model and not after it."""
    bundle = open_bundle(toy_bundle())
    bad = {name: np.full((1, *array.shape), np.nan, np.float32) for name, array in frame().items()}
    assert np.isfinite(run_model(bundle.model_bytes("int8-cpu"), bad)["bev"]).all()
    assert np.isnan(run_model(bundle.model_bytes("fp32"), bad)["bev"]).all()


# T7
@pytest.mark.parametrize("value", [255.0, 1.001, -0.001, -1.0])
def test_out_of_range(value: float) -> None:
    bad = frame()
    bad["lidar"][3, 4, 5] = value
    found = runtime().infer(bad)
    assert found.reasons == (Reason.OUT_OF_RANGE,)
    assert "expected 0..1" in found.findings[0].detail
    assert found.outputs == {}


def test_ends_of_the_range_and_negative_zero_are_fine() -> None:
    good = frame()
    good["lidar"][0, 0, :3] = (0.0, -0.0, 1.0)
    assert runtime().infer(good).valid


# T9
@pytest.mark.parametrize("value", [0.0, 1.0, 0.3])
def test_constant_input_has_no_information(value: float) -> None:
    bad = frame()
    bad["camera"][:] = value
    found = runtime().infer(bad)
    assert Reason.LOW_INFORMATION in found.reasons
    assert not found.valid
    assert found.findings[-1].detail.startswith("camera") or "camera" in str(found.findings)


def test_single_colour_input_has_no_information() -> None:
    bad = frame()
    bad["camera"][:] = np.linspace(0.1, 0.9, 12, dtype=np.float32)[:, None, None]
    assert Reason.LOW_INFORMATION in runtime().infer(bad).reasons


def test_a_constant_channel_is_no_fault() -> None:
    good = frame()
    good["camera"][0] = 0  # no vehicle in sight
    assert Reason.LOW_INFORMATION not in runtime().infer(good).reasons


# T10, F13
def test_frozen_sensor() -> None:
    target = runtime(guards=GuardConfig(frozen_after=3))
    frozen = frame()["camera"]
    states = [target.infer({"lidar": frame(i)["lidar"], "camera": frozen.copy()}) for i in range(6)]
    assert [state.valid for state in states] == [True, True, True, False, False, False]
    assert states[3].reasons == (Reason.FROZEN,)
    assert "camera" in states[3].findings[0].detail
    assert "lidar" not in str(states[3].findings)
    moved = frozen.copy()
    moved[0, 0, 0] = 1 - moved[0, 0, 0]
    assert target.infer({"lidar": frame(9)["lidar"], "camera": moved}).valid


def test_other_content_with_equal_sums_is_not_frozen() -> None:
    target = runtime(guards=GuardConfig(frozen_after=2))
    one = frame()
    two = {name: np.ascontiguousarray(array[:, ::-1]) for name, array in one.items()}  # mirrored: sums stay
    assert all(target.infer(one if i % 2 else two).valid for i in range(8))


# T8, T17
def test_unusual_input_is_a_warning() -> None:
    odd = frame()
    odd["lidar"][2] = 1.0
    odd["lidar"][2, 0, 0] = 0.0
    found = runtime().infer(odd)
    assert found.reasons == (Reason.UNUSUAL_INPUT,)
    assert found.valid
    assert "mean of channel 2" in found.findings[0].detail


def test_clean_frames_raise_no_alarm() -> None:
    target = runtime()
    assert [target.infer(frame(i)).reasons for i in range(50)] == [()] * 50


# T11
@pytest.mark.parametrize("change", [np.asfortranarray, lambda x: np.ascontiguousarray(x[::-1])[::-1],
                                    lambda x: np.repeat(x, 2, axis=0)[::2]], ids=["fortran", "negative", "strided"])
def test_odd_memory_orders_give_the_same_result(change: Any) -> None:
    good, target = frame(), runtime(guards=GuardConfig(frozen_after=0))
    expected = target.infer(good).outputs["bev"]
    assert np.array_equal(target.infer({name: change(array) for name, array in good.items()}).outputs["bev"], expected)


def test_read_only_arrays_are_fine_and_inputs_are_untouched() -> None:
    good = frame()
    before = {name: array.copy() for name, array in good.items()}
    for array in good.values():
        array.flags.writeable = False
    assert runtime().infer(good).valid
    assert all(np.array_equal(good[name], before[name]) for name in good)


def test_outputs_belong_to_the_caller() -> None:
    target = runtime()
    first = target.infer(frame(1)).outputs["bev"]
    kept = first.copy()
    target.infer(frame(2))
    assert np.array_equal(first, kept)


# F1, F2, F14, F15
class Clock:
    """Nanoseconds that only move when told."""

    def __init__(self) -> None:
        self.now = 10**12

    def __call__(self) -> int:
        return self.now


def test_late_result_is_discarded() -> None:
    clock = Clock()
    target = Runtime(toy_bundle(), tiers=("fp32",), deadline_ms=100, clock=clock)
    run = target.backend.run

    def slow(feeds: Arrays) -> Any:
        clock.now += 150_000_000
        return run(feeds)

    target.backend.run = slow  # type: ignore[method-assign]
    found = target.infer(frame(), stamp_ns=clock.now)
    assert found.reasons == (Reason.LATE,)
    assert not found.valid
    assert found.outputs == {}
    assert found.age_ms == 150
    target.backend.run = run  # type: ignore[method-assign]
    assert target.infer(frame(1), stamp_ns=clock.now).valid


@pytest.mark.parametrize(("age_ms", "reason"), [(3000, Reason.STALE), (-1, Reason.BAD_STAMP)])
def test_stale_and_future_stamps(age_ms: int, reason: Reason) -> None:
    clock = Clock()
    target = Runtime(toy_bundle(), tiers=("fp32",), deadline_ms=100, clock=clock)
    found = target.infer(frame(), stamp_ns=clock.now - age_ms * 1_000_000)
    assert found.reasons[0] is reason
    assert found.outputs == {}
    assert not found.valid


def test_repeated_and_reordered_stamps() -> None:
    clock = Clock()
    target = Runtime(toy_bundle(), tiers=("fp32",), clock=clock)
    assert target.infer(frame(0), stamp_ns=clock.now - 5).valid
    for stamp, word in ((clock.now - 5, "repeats"), (clock.now - 9, "older")):
        found = target.infer(frame(1), stamp_ns=stamp)
        assert found.reasons == (Reason.BAD_STAMP,)
        assert word in found.findings[0].detail
    assert target.infer(frame(2), stamp_ns=clock.now).valid


# F5
def test_backend_that_raises_costs_one_frame() -> None:
    target = runtime()
    run = target.backend.run

    def broken(feeds: Arrays) -> Any:
        raise RuntimeError("device lost\nlong story")

    target.backend.run = broken  # type: ignore[method-assign]
    found = target.infer(frame())
    assert found.reasons == (Reason.BACKEND_ERROR,)
    assert found.findings[0].detail == "device lost"
    assert target.inference.num_backend_errors == 1
    target.backend.run = run  # type: ignore[method-assign]
    assert target.infer(frame(1)).valid


def test_output_that_is_not_finite() -> None:
    target = runtime()
    run = target.backend.run

    def broken(feeds: Arrays) -> Any:
        outputs = [array.copy() for array in run(feeds)]
        outputs[0][0, 0, 0, 0] = np.nan
        return outputs

    target.backend.run = broken  # type: ignore[method-assign]
    found = target.infer(frame())
    assert found.reasons == (Reason.NOT_FINITE_OUTPUT,)
    assert found.outputs == {}


def test_every_frame_says_who_made_it() -> None:
    target = runtime("int8-cpu")
    one, two = target.infer(frame(0)), target.infer(frame(1))
    assert (one.seq, two.seq) == (0, 1)
    record = one.record()
    bundle = open_bundle(toy_bundle())
    assert record["bundle"] == bundle.digest
    assert record["model"] == bundle.model_sha256("int8-cpu")
    assert (record["tier"], record["provider"]) == ("int8-cpu", "CPUExecutionProvider")
    assert record["published_ns"] >= record["stamp_ns"]
    assert record["valid"] is True
