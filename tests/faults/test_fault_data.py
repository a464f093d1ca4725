"""Rows M26 and M27: data sets that cannot calibrate, and data that was seen before."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmdeploy.data import format as shards
from fmdeploy.data.format import open_dataset, read_shard
from fmdeploy.data.from_arrays import write_arrays
from fmdeploy.errors import DataError
from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.quantize.samples import CalibrationSet, check_inputs, draw, refuse_overlap, remarks
from fmdeploy.task import Arrays, load_task
from support.fdti import Fdti
from support.tarshards import shard

IO = IOSpec(inputs=(TensorSpec(name="image", shape=(3, 8, 8), layout="CHW", value_range=(0.0, 1.0)),),
            outputs=(TensorSpec(name="logits", shape=(10,)),), preprocessing="scale to 0..1")


def images(count: int = 20, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).random((count, 3, 8, 8), np.float32)


def chosen(image: np.ndarray[Any, Any]) -> CalibrationSet:
    return CalibrationSet(tuple(f"s{k}/0" for k in range(len(image))), {"image": image}, "0" * 64, 0)


def with_nan(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    image[4, 1, 2, 3] = np.nan
    return image


BAD: dict[str, tuple[Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]], str]] = {
    "empty": (lambda x: x[:0], "no calibration samples"),
    "all black": (lambda x: x * 0, "constant"),
    "wrong size": (lambda x: x[..., :7], "another shape"),
    "not RGB": (lambda x: x[:, :1], "another shape"),
    "16-bit values": (lambda x: x * 65535, "leaves its range"),
    "16-bit type": (lambda x: (x * 65535).astype(np.uint16), "another shape or type"),
    "NaN": (with_nan, "leaves its range|NaN"),
}


@pytest.mark.parametrize("case", BAD)
def test_M26_calibration_samples_that_cannot_calibrate(case: str, fdti: Fdti) -> None:
    change, words = BAD[case]
    bad = chosen(change(images()))
    with fdti.detecting(case), pytest.raises(DataError, match=words):
        check_inputs(bad, IO)


def test_M26_control_good_samples_are_taken_without_a_remark() -> None:
    good = chosen(images())
    check_inputs(good, IO)
    assert remarks(good) == ()


def test_M26_odd_samples_are_counted(fdti: Fdti) -> None:
    odd = images(8)
    odd[2] = odd[1]
    odd[5] = 0.5
    with fdti.detecting("odd samples"):
        found = remarks(chosen(odd))
    assert found == ("1 of 8 samples of image are constant", "1 of 8 samples repeat another one",
                     "only 8 samples; ranges from fewer than 16 depend on which they are")


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def test_M26_pickled_objects_in_a_shard(tmp_path: Path, fdti: Fdti) -> None:
    marker = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (marker,)

    hostile = shard(tmp_path / "a.tar", {"s.npz": npz(image=np.array([Payload()], dtype=object))})
    with fdti.detecting("object array"), pytest.raises(DataError, match="cannot be read as a shard"):
        read_shard(hostile)
    assert not marker.exists()


def test_M26_npz_bomb(tmp_path: Path, fdti: Fdti, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_MEMBER_BYTES", 2**24)
    bomb = npz(image=np.zeros(2**25, np.uint8))
    assert len(bomb) < 2**16, "it packs well below the bound"
    with fdti.detecting("npz bomb"), pytest.raises(DataError, match="unpacks to 33554560 bytes"):
        read_shard(shard(tmp_path / "a.tar", {"s.npz": bomb}))


@pytest.mark.parametrize("content", [b"\xff\xd8\xff\xe0 half a jpeg", b"", zipfile.ZIP_DEFLATED.to_bytes(4, "big")])
def test_M26_files_that_are_no_arrays(content: bytes, tmp_path: Path, fdti: Fdti) -> None:
    with fdti.detecting("not an npz"), pytest.raises(DataError, match="cannot be read as a shard"):
        read_shard(shard(tmp_path / "a.tar", {"s.npz": content}))


def test_M26_control_a_good_shard_is_read(tmp_path: Path) -> None:
    found = read_shard(shard(tmp_path / "a.tar", {"s.npz": npz(image=np.arange(4))}))
    assert found["s"]["image"].tolist() == [0, 1, 2, 3]


def test_M26_labels_of_another_length(tmp_path: Path, fdti: Fdti) -> None:
    arrays = {"image": images(8), "label": np.zeros(5, np.int64)}
    with fdti.detecting("labels mismatch"), pytest.raises(DataError, match="another number of samples"):
        write_arrays(tmp_path / "d", arrays, {"train": np.arange(8)})
    assert not (tmp_path / "d").exists()


# M27


def splits(tmp_path: Path, arrays: Arrays) -> Any:
    write_arrays(tmp_path / "data", arrays, {"train": np.arange(8), "val": np.arange(8, 10), "test": np.arange(10, 12)})
    return open_dataset(tmp_path / "data")


def test_M27_calibration_that_holds_an_evaluation_sample(tmp_path: Path, fdti: Fdti) -> None:
    arrays: Arrays = {"image": np.random.default_rng(0).random((12, 3, 32, 32), np.float32), "label": np.arange(12) % 10}
    data, task = splits(tmp_path, arrays), load_task("image-classification")
    leaked = CalibrationSet(("own/0",), {"image": arrays["image"][10:11]}, data.digest, 0)
    with fdti.detecting("calibration holds a test sample"), pytest.raises(DataError, match="held-out"):
        refuse_overlap(leaked, task, data)


def test_M27_control_training_samples_may_calibrate(tmp_path: Path) -> None:
    arrays: Arrays = {"image": np.random.default_rng(0).random((12, 3, 32, 32), np.float32), "label": np.arange(12) % 10}
    data, task = splits(tmp_path, arrays), load_task("image-classification")
    own = CalibrationSet(("own/0",), {"image": arrays["image"][3:4]}, data.digest, 0)
    refuse_overlap(own, task, data)
    assert len(draw(task, data, count=8, seed=0)) == 8
