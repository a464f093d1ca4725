"""The feature cache: equal to the live teacher, refused when stale, resumed shard by shard."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.data.format import open_dataset
from fmdeploy.errors import ArtifactError, ConfigError
from fmdeploy.manifest import Kind
from fmdeploy.models.saved import load_model
from fmdeploy.task import Arrays, load_task
from fmdeploy.teacher.cache import cache
from fmdeploy.teacher.caching.index import read_index
from fmdeploy.teacher.features import CacheReader, map_safetensors
from fmdeploy.teacher.train import train
from fmdeploy.teacher.view import TeacherView
from support.training_data import TEACHER, write_scenes

TASK = load_task("bev-occupancy")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, `teacher` and `features`."""
    folder = tmp_path_factory.mktemp("cache")
    write_scenes(folder / "data")
    train(data=folder / "data", out=folder / "teacher", steps=4, **TEACHER)
    cache(teacher=folder / "teacher", data=folder / "data", out=folder / "features", per_shard=8, precision="fp32")
    return folder


def _open(
    home: Path, features: Artifact | None = None, teacher: Artifact | None = None, changes: dict[str, str] | None = None
) -> CacheReader:
    data = open_dataset(home / "data")
    wanted = {"data": data.digest, "split": "train", "preprocessing": TASK.io.digest} | (changes or {})
    return CacheReader.open(
        features or open_artifact(home / "features", Kind.FEATURES), samples=TASK.samples(data, "train"),
        teacher=teacher or open_artifact(home / "teacher", Kind.TEACHER), **wanted,
    )


def test_cached_answers_equal_the_live_teacher(home: Path) -> None:
    samples = TASK.samples(open_dataset(home / "data"), "train")
    index = np.array([17, 3, 3, 30, 8])
    view = TeacherView(load_model(open_artifact(home / "teacher")).module, TASK.io, (TASK.teacher_layer,), "fp32")
    live = view.arrays(samples.batch(index)[0], torch.device("cpu"))
    cached = _open(home).batch(index)
    assert set(cached) == set(live) == {"bev", "scene", "feature.tokens"}
    for name, array in cached.items():
        assert array.dtype == np.float16
        np.testing.assert_allclose(array, live[name], rtol=1e-3, atol=2e-3)


def test_a_cache_of_another_teacher_data_split_or_preprocessing_is_refused(home: Path, tmp_path: Path) -> None:
    other = train(data=home / "data", out=tmp_path / "other", steps=3, **TEACHER)
    with pytest.raises(ArtifactError, match="stale or foreign: it was made from another teacher"):
        _open(home, teacher=other)
    for key in ("data", "split", "preprocessing"):
        with pytest.raises(ArtifactError, match=f"made from another {key}"):
            _open(home, changes={key: "0" * 64})


def test_a_teacher_is_no_cache(home: Path) -> None:
    with pytest.raises(ArtifactError, match="another kind"):
        open_artifact(home / "teacher", Kind.FEATURES)


def test_shards_cover_all_samples_and_the_same_request_gives_the_same_digest(home: Path, tmp_path: Path) -> None:
    features = open_artifact(home / "features")
    (key,) = (each.address.key for each in read_index(features).caches)
    assert sorted(n for n in features.manifest.files if n.startswith("features/")) == [
        f"features/{key}/{number:05d}.safetensors" for number in range(5)
    ]
    assert features.json("metrics.json")["samples"] == 36
    again = cache(teacher=home / "teacher", data=home / "data", out=tmp_path / "f", per_shard=8, precision="fp32")
    assert again.digest == features.digest


def test_float32_is_kept_to_the_bit_of_a_whole_batch(home: Path, tmp_path: Path) -> None:
    features = cache(teacher=home / "teacher", data=home / "data", out=tmp_path / "f", encoding="float32",
                     logits=("float32",), precision="fp32", layers=("tokens", "scene"))
    found = _open(home, features).batch(np.arange(36))
    view = TeacherView(load_model(open_artifact(home / "teacher")).module, TASK.io, ("tokens", "scene"), "fp32")
    live = view.arrays(TASK.samples(open_dataset(home / "data"), "train").batch(np.arange(36))[0], torch.device("cpu"))
    assert set(found) == {"bev", "scene", "feature.tokens", "feature.scene"}
    assert all(np.array_equal(found[name], live[name]) for name in found)


def test_an_unknown_layer_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such layer"):
        cache(teacher=home / "teacher", data=home / "data", out=tmp_path / "f", layers=("nowhere",))
    assert not (tmp_path / "f").exists()


def test_maps_read_what_safetensors_wrote(tmp_path: Path) -> None:
    arrays: Arrays = {"a": np.arange(24, dtype=np.float16).reshape(2, 3, 4), "b": np.array([[1.5], [2.5]], np.float32)}
    save_file(arrays, tmp_path / "x.safetensors")
    mapped, loaded = map_safetensors(tmp_path / "x.safetensors"), load_file(tmp_path / "x.safetensors")
    assert all(np.array_equal(mapped[name], loaded[name]) for name in arrays)
    assert not mapped["a"].flags.writeable


def test_a_header_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_file({"a": np.zeros((4, 4), np.float32)}, tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(raw[:-8])
    with pytest.raises(ArtifactError, match="does not fit the file"):
        map_safetensors(tmp_path / "x.safetensors")


def test_safetensors_still_scrambles_arrays_that_are_not_c_contiguous(tmp_path: Path) -> None:
    """One reason why `caching.shardfile` writes shards itself."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    save_file({"a": array}, tmp_path / "x.safetensors")
    assert not np.array_equal(load_file(tmp_path / "x.safetensors")["a"], array)
