"""Structure of a frame (T1 to T5, T12, T13): the caller's mistake, so it raises, before any guard and any model."""

from __future__ import annotations

import functools
import mmap
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmdeploy.errors import FrameError
from fmdeploy.runtime import GuardConfig, Runtime, open_bundle
from fmdeploy.runtime.guards.content import Guards
from support.bundles import Arrays
from support.fdti import Fdti
from support.runtimes import frame, runtime, toy_bundle


class Sub(np.ndarray[Any, Any]):
    """A subclass that could do anything."""


@functools.cache
def target() -> Runtime:
    """One runtime for all refusals: none may leave a trace in it."""
    return runtime(guards=GuardConfig(frozen_after=0))


def refused(inputs: Any, message: str, fdti: Fdti | None = None) -> None:
    """The frame raises one clear line, and the next one runs."""
    running = target()
    with pytest.raises(FrameError, match=message) as caught, fdti.raising() if fdti else nullcontext():
        running.infer(inputs)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert target().infer(frame()).valid, "a refused frame must not harm the next one"


def lidar(change: Any) -> Arrays:
    """A good frame with another lidar."""
    good = frame()
    return {**good, "lidar": change(good["lidar"])}


def accepted() -> None:
    """The control of every row here: the frame as io.json has it runs."""
    found = target().infer(frame())
    assert found.valid
    assert found.reasons == ()


@pytest.mark.parametrize("inputs", [{}, {"lidar": frame()["lidar"]}, {**frame(), "radar": frame()["lidar"]}],
                         ids=["empty", "missing", "extra"])
def test_T1_names_are_exact(inputs: Arrays, fdti: Fdti) -> None:
    refused(inputs, r"exactly the inputs .*expected \['camera', 'lidar'\]", fdti)


def test_T1_None_instead_of_an_array() -> None:
    refused(lidar(lambda x: None), "'lidar'.*not a plain numpy array .*found builtins.NoneType")
    refused(None, "a frame is a dict")
    refused(frame()["lidar"], "a frame is a dict")


def test_T1_control_all_names_run() -> None:
    accepted()


@pytest.mark.parametrize("dtype", ["float64", "float16", "uint8", "int64", "bool", "object", "U4"])
def test_T2_other_dtype(dtype: str, fdti: Fdti) -> None:
    refused(lidar(lambda x: x.astype(dtype)), "'lidar'.*wrong dtype; nothing is cast silently", fdti)


def test_T2_other_byte_order() -> None:
    refused(lidar(lambda x: x.astype(">f4")), "wrong byte order .*found >f4")


def test_T2_control_the_right_dtype_runs() -> None:
    accepted()


SHAPES: dict[str, tuple[Any, str]] = {
    "rank 2": (lambda x: x[0], r"wrong shape .*expected .*\(8, 16, 16\) CHW, found .*\(16, 16\)"),
    "rank 5": (lambda x: x[None, None], "wrong shape"),
    "height": (lambda x: np.ascontiguousarray(x[:, :15]), "wrong shape"),
    "channels last": (lambda x: np.ascontiguousarray(x.transpose(1, 2, 0)), "looks channels-last"),
    "batch of 1": (lambda x: x[None], "batch axis of 1, give one frame"),
    "batch of 2": (lambda x: np.stack([x, x]), "batch axis of 2"),
}


@pytest.mark.parametrize("case", SHAPES)
def test_T3_other_shape(case: str, fdti: Fdti) -> None:
    change, message = SHAPES[case]
    refused(lidar(change), message, fdti)


def test_T3_control_the_right_shape_runs() -> None:
    accepted()


def cube_guards() -> tuple[Guards, Arrays]:
    """Guards of an input whose shape does not tell its axes apart, and a frame for them."""
    bundle = open_bundle(toy_bundle())
    spec = bundle.io.inputs[0].model_copy(update={"shape": (16, 16, 16)})
    cube = bundle.io.model_copy(update={"inputs": (spec,)})
    statistics = {"lidar": bundle.statistics["lidar"].model_copy(
        update={"channel_mean": (0.2,) * 16, "channel_std": (0.1,) * 16})}
    return Guards(cube, statistics, GuardConfig()), {"lidar": np.zeros((16, 16, 16), np.float32)}


def test_T4_shape_that_does_not_tell_the_axes_apart(fdti: Fdti) -> None:
    guards, cube = cube_guards()
    with pytest.raises(FrameError, match="any axis could be the channels"), fdti.raising():
        guards.structure(cube, None)
    with pytest.raises(FrameError, match="expected CHW, found HWC"):
        guards.structure(cube, {"lidar": "HWC"})


def test_T4_layout_that_is_wrong_where_the_shape_would_do() -> None:
    """The caller believes something that is not so."""
    with pytest.raises(FrameError, match=r"'lidar': has the wrong layout \(expected CHW, found HWC\)"):
        target().infer(frame(), layouts={"lidar": "HWC"})
    with pytest.raises(FrameError, match="a layout is given for an input that io.json lacks"):
        target().infer(frame(), layouts={"lider": "CHW"})


def test_T4_control_the_right_layout_runs() -> None:
    guards, cube = cube_guards()
    guards.structure(cube, {"lidar": "CHW"})
    assert target().infer(frame(), layouts={"lidar": "CHW"}).valid


def test_T5_empty_batch(fdti: Fdti) -> None:
    refused(lidar(lambda x: x[None][:0]), "batch axis of 0", fdti)
    refused(lidar(lambda x: x[:0]), "wrong shape")


def test_T5_control_one_frame_runs() -> None:
    accepted()


def mapped(tmp: Path, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A plain array over a memory-mapped file."""
    path = tmp / "x.bin"
    array.tofile(path)
    with path.open("r+b") as stream:
        return np.frombuffer(mmap.mmap(stream.fileno(), 0), np.float32).reshape(array.shape)


def test_T12_memory_maps(tmp_path: Path, fdti: Fdti) -> None:
    good = frame()
    good["lidar"].tofile(tmp_path / "m.bin")
    memmap = np.memmap(tmp_path / "m.bin", np.float32, "r", shape=(8, 16, 16))
    refused({**good, "lidar": memmap}, "memmap", fdti)
    refused({**good, "lidar": np.asarray(memmap)[:]}, "view of a memory-mapped file")
    refused({**good, "lidar": mapped(tmp_path, good["lidar"])}, "view of a memory-mapped file")


@pytest.mark.parametrize("change", [lambda x: np.ma.masked_array(x, mask=x > 0), lambda x: x.view(Sub),
                                    lambda x: np.asmatrix(x[0])], ids=["masked", "subclass", "matrix"])
@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_T12_subclasses(change: Any) -> None:
    refused(lidar(change), "not a plain numpy array")


def test_T12_control_a_copy_of_a_memory_map_runs(tmp_path: Path) -> None:
    good = frame()
    assert target().infer({**good, "lidar": mapped(tmp_path, good["lidar"]).copy()}).valid


@pytest.mark.parametrize("change", [lambda x: x.tolist(), lambda x: 0.5, lambda x: [0.0] * 10**6,
                                    lambda x: np.float32(1), lambda x: b"\0" * 8192],
                         ids=["list", "number", "huge list", "numpy scalar", "bytes"])
def test_T13_things_that_are_no_arrays(change: Any, fdti: Fdti) -> None:
    refused(lidar(change), "'lidar'.*not a plain numpy array .*found", fdti)


def test_T13_array_of_rank_0() -> None:
    refused(lidar(lambda x: np.array(0.5, np.float32)), r"wrong shape .*found .*\(\)")


def test_T13_control_an_array_runs() -> None:
    accepted()
