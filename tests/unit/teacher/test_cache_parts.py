"""Several teachers in one cache, what is taken from an older one, parts of several machines, and shards that lie."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.data.format import open_dataset
from fmdeploy.distill.distill import distill
from fmdeploy.errors import ArtifactError, ConfigError, DataError
from fmdeploy.manifest import Kind
from fmdeploy.models.saved import load_model
from fmdeploy.task import load_task
from fmdeploy.teacher.cache import cache
from fmdeploy.teacher.caching.export import export
from fmdeploy.teacher.caching.index import read_index
from fmdeploy.teacher.caching.merge import merge
from fmdeploy.teacher.caching.shardfile import NOTE, map_noted, map_shard, write_shard
from fmdeploy.teacher.features import CacheReader
from fmdeploy.teacher.train import train
from fmdeploy.teacher.view import TeacherView
from support.processes import FMDEPLOY
from support.training_data import TEACHER, write_scenes

TASK = load_task("bev-occupancy")
COMMON: dict[str, Any] = {"per_shard": 8, "precision": "fp32", "batch": 4}
SAMPLES = 36


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, the teachers `one` and `two`, and FEATURES of `one`."""
    folder = tmp_path_factory.mktemp("parts")
    write_scenes(folder / "data")
    for number, name in enumerate(("one", "two")):
        train(data=folder / "data", out=folder / name, steps=1, seed=number, **TEACHER)
    cache(teacher=folder / "one", data=folder / "data", out=folder / "features", **COMMON)
    return folder


def _cache(home: Path, out: Path, *teachers: str, **options: Any) -> Artifact:
    return cache(teacher=[str(home / name) for name in teachers or ("one",)], data=home / "data", out=out,
                 **COMMON | options)


def _reader(home: Path, features: Artifact, teacher: str = "one", split: str = "train") -> CacheReader:
    data = open_dataset(home / "data")
    return CacheReader.open(features, teacher=open_artifact(home / teacher), data=data.digest, split=split,
                            samples=TASK.samples(data, split), preprocessing=TASK.io.digest)


def _payload(artifact: Artifact) -> dict[str, bytes]:
    return {name: artifact.path(name).read_bytes() for name in artifact.manifest.files}


def _no_teacher(monkeypatch: pytest.MonkeyPatch, digest: str = "") -> None:
    """From here on a forward pass of this teacher (or of any) is an error."""
    answers = TeacherView.tensors

    def refuse(self: TeacherView, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not digest or _fingerprint(self.module) == digest:
            raise AssertionError("the teacher ran again")
        return answers(self, inputs)

    monkeypatch.setattr(TeacherView, "tensors", refuse)


def _fingerprint(module: torch.nn.Module) -> str:
    return str(sum(float(value.detach().double().sum()) for value in module.parameters()))


def test_several_teachers_are_several_readers_over_one_artifact(home: Path, tmp_path: Path) -> None:
    both, index = _cache(home, tmp_path / "f", "one", "two"), np.array([35, 0, 7, 8, 0])
    assert sorted(both.inputs) == ["data", "teacher", "teacher2"]
    alone = {name: _reader(home, _cache(home, tmp_path / name, name), name).batch(index) for name in ("one", "two")}
    found = {name: _reader(home, both, name).batch(index) for name in ("one", "two")}
    for name in ("one", "two"):
        assert set(found[name]) == {"bev", "scene", "feature.tokens"}
        assert all(np.array_equal(found[name][key], alone[name][key]) for key in found[name])
    assert not np.array_equal(found["one"]["bev"], found["two"]["bev"])


def test_adding_a_teacher_does_not_run_the_first_one_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = _cache(home, tmp_path / "fresh", "one", "two")
    _no_teacher(monkeypatch, _fingerprint(load_model(open_artifact(home / "one")).module))
    reused = _cache(home, tmp_path / "reused", "one", "two", reuse=home / "features")
    assert reused.digest == fresh.digest
    name = next(name for name in open_artifact(home / "features").manifest.files if name.endswith("00000.safetensors"))
    assert os.path.samefile(home / "features" / name, reused.path(name))
    with pytest.raises(AssertionError, match="the teacher ran again"):
        _cache(home, tmp_path / "other", "one", reuse=home / "features", encoding="int8")


TASK_SOURCE = """
from fmdeploy.tasks.bev_occupancy import BevOccupancy


class MyTask(BevOccupancy):
    pass
"""


def test_an_edited_task_takes_nothing_from_an_older_cache(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "my_task_for_the_cache.py"
    source.write_text(TASK_SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    train(data=home / "data", out=tmp_path / "mine", steps=1, task="my_task_for_the_cache:MyTask", **TEACHER)
    options: dict[str, Any] = {"teacher": tmp_path / "mine", "data": home / "data", "reuse": tmp_path / "f", **COMMON}
    first = cache(out=tmp_path / "f", **{**options, "reuse": ()})
    assert first.manifest.config["task_source"] == read_index(first).caches[0].address.task_source is not None
    _no_teacher(monkeypatch)
    assert cache(out=tmp_path / "again", **options).digest == first.digest
    source.write_text(TASK_SOURCE + "    width = 2\n")
    with pytest.raises(AssertionError, match="the teacher ran again"):
        cache(out=tmp_path / "edited", **options)
    with pytest.raises(ArtifactError, match="already holds another artifact"):
        cache(out=tmp_path / "f", **options)
    stale = r"stale or foreign: it was made from another code of the task \(expected [0-9a-f]{12}, found [0-9a-f]{12}\)"
    with pytest.raises(ArtifactError, match=stale):
        export(features=tmp_path / "f", data=home / "data", out=tmp_path / "tars", task="my_task_for_the_cache:MyTask")
    with pytest.raises(ArtifactError, match=stale):
        distill(data=home / "data", out=tmp_path / "s", teacher=tmp_path / "mine", features=tmp_path / "f", steps=1,
                task="my_task_for_the_cache:MyTask")
    assert "task_source" not in open_artifact(home / "features").manifest.config


def test_a_copy_serves_where_links_do_not(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    _no_teacher(monkeypatch)
    again = _cache(home, tmp_path / "f", reuse=home / "features")
    assert again.digest == open_artifact(home / "features").digest


def test_a_backbone_without_heads_is_cached_without_logits(home: Path, tmp_path: Path) -> None:
    bare = _with_recipe(home / "one", tmp_path / "bare", heads=False)
    features = cache(teacher=bare, data=home / "data", out=tmp_path / "f", **COMMON)
    (entry,) = read_index(features).caches
    assert (list(entry.arrays), entry.address.logits) == (["feature.tokens"], {})


def _with_recipe(teacher: Path, out: Path, **changes: Any) -> Path:
    """A sealed copy of a TEACHER whose recipe says something else."""
    from fmdeploy.config import StageConfig
    from fmdeploy.draft import Draft, produce

    def build(draft: Draft) -> None:
        source = open_artifact(teacher)
        for name in source.manifest.files:
            shutil.copyfile(source.path(name), draft.path(name))
        draft.write_json("model.json", {**source.json("model.json"), **changes})

    produce(out, Kind.TEACHER, stage="test", config=StageConfig(), inputs={}, build=build)
    return out


@pytest.mark.parametrize(("options", "smaller"), [
    ({"encoding": "int8", "logits": ("int8",)}, 0.55),
    ({"encoding": "pca:4+int8", "logits": ("uint8", "scene=topk:3")}, 0.51),
    ({"encoding": "pca:0.999"}, 1.0),
])
def test_every_encoding_is_written_read_and_measured(
    home: Path, tmp_path: Path, options: dict[str, Any], smaller: float
) -> None:
    features, index = _cache(home, tmp_path / "f", **options), np.array([3, 35, 17])
    reader, plain = _reader(home, features), _reader(home, open_artifact(home / "features"))
    found, wanted = reader.batch(index), plain.batch(index)
    assert {name: value.shape[1:] for name, value in found.items()} == reader.shapes == plain.shapes
    metrics = features.json("metrics.json")
    numbers = metrics["teachers"][open_artifact(home / "one").digest[:12]]
    assert sum(each["bytes_per_sample"] for each in numbers.values()) == pytest.approx(
        metrics["bytes_per_sample"], abs=600)
    base = open_artifact(home / "features").json("metrics.json")["bytes_per_sample"]
    assert metrics["bytes_per_sample"] <= smaller * base + 300
    for name, value in found.items():
        assert numbers[name]["cosine"] > (0.8 if name == "feature.tokens" else 0.99), name
        assert np.abs(value.astype(np.float32) - wanted[name]).max() < 10


def test_nan_of_a_teacher_is_refused_by_name(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = TeacherView.arrays

    def broken(self: TeacherView, inputs: Any, device: torch.device) -> Any:
        found = answers(self, inputs, device)
        found["scene"][0, 0] = np.nan
        return found

    monkeypatch.setattr(TeacherView, "arrays", broken)
    with pytest.raises(DataError, match="scene: the teacher's answer cannot be stored"):
        _cache(home, tmp_path / "f")
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(("options", "message"), [
    ({"encoding": "int3"}, "no such encoding of features"),
    ({"logits": ("bev=topk:3",)}, "bev: only a vector"),
    ({"logits": ("sky=uint8",)}, "no such output"),
    ({"shard": "0/2"}, "from 1 to n"),
    ({"shard": "3/2"}, "from 1 to n"),
    ({"shard": "half"}, "from 1 to n"),
    ({"shard": "6/9"}, "has no file to write"),
])
def test_what_cannot_be_cached_is_one_line(home: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        _cache(home, tmp_path / "f", **options)
    assert "\n" not in str(caught.value)


def test_the_same_teacher_twice_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the same teacher is given twice"):
        _cache(home, tmp_path / "f", "one", "one")


@pytest.mark.parametrize("options", [{}, {"encoding": "pca:4+int8", "logits": ("uint8", "scene=topk:3")}])
def test_parts_are_joined_into_what_one_run_writes(home: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    whole = _cache(home, tmp_path / "whole", "one", "two", **options)
    parts = [tmp_path / f"part{number}" for number in (1, 2, 3)]
    for number, part in enumerate(parts, 1):
        _cache(home, part, "one", "two", shard=f"{number}/3", **options)
    joined = merge(parts=[str(parts[2]), str(parts[0]), str(parts[1])], out=tmp_path / "joined")
    assert _payload(joined) == _payload(whole)
    assert joined.digest == whole.digest
    with pytest.raises(ArtifactError, match="is only a part of a feature cache"):
        _reader(home, open_artifact(parts[0]))


def test_missing_repeated_and_foreign_parts_are_refused(home: Path, tmp_path: Path) -> None:
    one, two, other, thirds, foreign = (tmp_path / name for name in ("one", "two", "other", "thirds", "foreign"))
    _cache(home, one, shard="1/2")
    _cache(home, two, shard="2/2")
    _cache(home, other, "two", shard="2/2")
    _cache(home, thirds, shard="2/3")
    _cache(home, foreign, shard="2/2", encoding="int8", batch=8)
    for parts, message in (
        ([one], "the part 2/2 is missing"), ([two], "the part 1/2 is missing"),
        ([one, two, two], "the part 2/2 is given twice"), ([one, other], "it was made with another teacher"),
        ([one, thirds], "cut into another number of shares"),
        ([one, foreign], "it was made with another batch, encoding"),
        ([one, home / "features"], "is no part but a whole feature cache"),
    ):
        with pytest.raises(ArtifactError, match=message) as caught:
            merge(parts=[str(part) for part in parts], out=tmp_path / "joined")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "joined").exists()


def _tampered(home: Path, out: Path, change: Callable[[Path], None]) -> Artifact:
    """A sealed int8 FEATURES whose first shard was changed before it was sealed."""
    from fmdeploy.config import StageConfig
    from fmdeploy.draft import Draft, produce

    source = _cache(home, out.with_name("source"), encoding="int8")

    def build(draft: Draft) -> None:
        for name in source.manifest.files:
            shutil.copyfile(source.path(name), draft.path(name))
        change(next(draft.root.glob("features/*/00000.safetensors")))

    return produce(out, Kind.FEATURES, stage="test", config=StageConfig(), inputs={}, build=build)


def _rewrite(path: Path, **changes: np.ndarray[Any, Any]) -> None:
    arrays, metadata = map_shard(path)
    write_shard(path, {name: changes.get(name.replace(".", "_").replace(":", "_"), value).copy()
                       for name, value in arrays.items()}, metadata)


def _nan_scale(path: Path) -> None:
    scale = map_shard(path)[0]["feature.tokens:scale"].copy()
    scale[3, 0, 0] = np.nan
    _rewrite(path, feature_tokens_scale=scale)


def _short(path: Path) -> None:
    _rewrite(path, bev=map_shard(path)[0]["bev"][:5])


def _other_type(path: Path) -> None:
    _rewrite(path, bev=map_shard(path)[0]["bev"].astype(np.float32))


def _swapped(path: Path) -> None:
    shutil.copyfile(path.with_name("00001.safetensors"), path)


def _anonymous(path: Path) -> None:
    arrays, _ = map_shard(path)
    write_shard(path, {name: value.copy() for name, value in arrays.items()}, {})


def _without(path: Path) -> None:
    arrays, metadata = map_shard(path)
    write_shard(path, {name: value.copy() for name, value in arrays.items() if name != "scene"}, metadata)


@pytest.mark.parametrize(("change", "message"), [
    (_nan_scale, "feature.tokens:scale holds a number that is not finite"),
    (_short, r"bev is not what the index says .*float16\[8, 5, 64, 64\]"),
    (_other_type, "bev is not what the index says"),
    (_swapped, "is a shard of another cache"),
    (_anonymous, "does not say which shard"),
    (_without, "scene is not what the index says .*found none"),
])
def test_a_shard_that_is_not_what_the_index_says_is_refused(
    home: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    features = _tampered(home, tmp_path / "tampered", change)
    with pytest.raises(ArtifactError, match=message) as caught:
        _reader(home, features)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("entry", [
    {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 999]},
    {"dtype": "F32", "shape": [4, 5], "data_offsets": [0, 64]},
    {"dtype": "F32", "shape": [-4, -4], "data_offsets": [0, 64]},
    {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 64]},
    {"dtype": "F32", "shape": [4, 4], "data_offsets": [-64, 0]},
    {"dtype": "F32", "shape": [4, 4.0], "data_offsets": [0, 64]},
    {"dtype": "F99", "shape": [4, 4], "data_offsets": [0, 64]},
    {"dtype": "F32", "shape": [4, 4]}, ["F32"], 7, None,
])
def test_headers_that_lie_are_refused(tmp_path: Path, entry: Any) -> None:
    text = json.dumps({"a": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    with pytest.raises(ArtifactError, match="the header does not fit the file"):
        map_shard(tmp_path / "x.safetensors")


@pytest.mark.parametrize("content", [b"", b"1234567", bytes(8), b"\xff" * 64, (9).to_bytes(8, "little") + b"[1, 2, 3]",
                                     (8).to_bytes(8, "little") + b'{"a": 1'])
def test_what_is_no_shard_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError):
        map_noted(tmp_path / "x.safetensors")


def test_samples_that_are_not_there_are_refused(home: Path) -> None:
    reader = _reader(home, open_artifact(home / "features"))
    assert len(reader) == SAMPLES
    for number in (-1, SAMPLES):
        with pytest.raises(IndexError):
            reader.batch(np.array([0, number]))


def test_kill_9_costs_one_shard_at_most_and_leaves_none_torn(home: Path, tmp_path: Path) -> None:
    out, partial = tmp_path / "f", tmp_path / ".f.partial"
    argv = [*FMDEPLOY, "cache", "--teacher", str(home / "one"), "--data", str(home / "data"), "--out", str(out),
            "--per-shard", "1", "--precision", "fp32", "--batch", "1"]  # 36 shards: time to kill it
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as process:
        while len(list(partial.glob("features/*/[0-9]*"))) < 2:
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    kept = {path: path.stat().st_mtime_ns for path in partial.glob("features/*/[0-9]*")}
    assert 2 <= len(kept) < SAMPLES
    assert all(map_noted(path)[1]["shard"] == int(path.stem) for path in kept)
    torn = next(path for path in kept if path.stem == "00001")
    torn.write_bytes(torn.read_bytes()[:-100])  # as after a power cut: it is made again, and only it
    again = COMMON | {"per_shard": 1, "batch": 1}
    features = cache(teacher=home / "one", data=home / "data", out=out, **again)
    made_again = [path for path, time_ns in kept.items()
                  if features.path(str(path.relative_to(partial))).stat().st_mtime_ns != time_ns]
    assert made_again == [torn]
    assert features.digest == cache(teacher=home / "one", data=home / "data", out=tmp_path / "again", **again).digest


def test_a_write_is_whole_when_the_disk_takes_it_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, content, offset: write(handle, content[:1000], offset))
    value = np.arange(5000, dtype=np.float32).reshape(50, 100)
    write_shard(tmp_path / "x.safetensors", {"a": value, "b": np.arange(7, dtype=np.int8)}, {NOTE: "{}"})
    found, _ = map_shard(tmp_path / "x.safetensors")
    assert np.array_equal(found["a"], value)
    assert found["b"].tolist() == list(range(7))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:webdataset")
def test_webdataset_reads_equal_bytes_from_the_export(home: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    features = _cache(home, tmp_path / "f", "one", "two", encoding="int8")
    found = export(features=tmp_path / "f", data=home / "data", out=tmp_path / "wds", per_shard=10)
    assert found.data["samples"] == SAMPLES
    names = [str(tmp_path / "wds" / shard["name"]) for shard in found.data["shards"]]
    assert sorted(path.name for path in (tmp_path / "wds").iterdir()) == ["index.json", *map(os.path.basename, names)]
    with warnings.catch_warnings():  # webdataset leaves its files to the garbage collector
        warnings.simplefilter("ignore", ResourceWarning)
        read = list(webdataset.WebDataset(names, shardshuffle=False, empty_check=False).decode())
        gc.collect()
    samples = TASK.samples(open_dataset(home / "data"), "train")
    assert [each["__key__"] for each in read] == list(samples.ids)
    inputs, targets = samples.batch(np.arange(SAMPLES))
    kinds = {"input": inputs, "target": targets, "teacher": _reader(home, features).batch(np.arange(SAMPLES)),
             "teacher2": _reader(home, features, "two").batch(np.arange(SAMPLES))}
    for row, each in enumerate(read):
        assert each["json"]["id"] == samples.ids[row]
        for kind, arrays in kinds.items():
            for name, value in arrays.items():
                array = each[f"{kind}.{name}.npy"]
                assert (array.dtype, array.tobytes()) == (value.dtype, value[row].tobytes())
    again = export(features=tmp_path / "f", data=home / "data", out=tmp_path / "again", per_shard=10)
    assert again.data["shards"] == found.data["shards"]
    with pytest.raises(ArtifactError, match="already exists"):
        export(features=tmp_path / "f", data=home / "data", out=tmp_path / "wds")
