"""`teacher train`: what it writes, and that the same request gives the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fmdeploy.artifact import open_artifact
from fmdeploy.data.format import open_dataset
from fmdeploy.data.from_arrays import write_arrays
from fmdeploy.errors import ConfigError, DataError
from fmdeploy.evaluate.evaluation import Evaluation
from fmdeploy.models.saved import load_model
from fmdeploy.teacher.train import train
from support.recomputing import watch_recomputing
from support.training_data import TEACHER, write_scenes


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` and `teacher`."""
    folder = tmp_path_factory.mktemp("teacher")
    write_scenes(folder / "data")
    train(data=folder / "data", out=folder / "teacher", steps=40, **TEACHER)
    return folder


def test_it_learns(home: Path) -> None:
    curve = open_artifact(home / "teacher").json("curve.json")
    first, last = (np.mean([value for _, value in part]) for part in (curve["loss"][:5], curve["loss"][-5:]))
    assert last < 0.8 * first
    assert set(curve) == {"loss", "lr", "grad_norm", "loss.hard"}


def test_it_carries_weights_recipe_and_evaluations(home: Path) -> None:
    teacher, data = open_artifact(home / "teacher"), open_dataset(home / "data")
    loaded = load_model(teacher)
    metrics = teacher.json("metrics.json")
    sizes = {key: TEACHER[key] for key in ("dim", "depth", "heads", "stem_width", "width")}
    assert loaded.recipe.options == {**sizes, "activation_checkpointing": False}
    assert metrics["params"] == sum(p.numel() for p in loaded.module.parameters())
    for split, name in (("val", "validation"), ("test", "evaluation")):
        evaluation = Evaluation.load(teacher, name)
        assert evaluation.data == f"{data.digest}:{split}"
        assert len(evaluation) == len(loaded.task.samples(data, split))
        assert metrics[split]["iou"] == pytest.approx(evaluation.value(loaded.task.metrics()[0]), nan_ok=True)
    assert teacher.manifest.config["precision"] == "fp32"
    assert teacher.manifest.config["task"] == "bev-occupancy"
    assert 0 <= teacher.manifest.environment["training"]["data_wait_share"] <= 1


def test_the_same_request_gives_the_same_digest_and_another_seed_another(home: Path, tmp_path: Path) -> None:
    digests = [train(data=home / "data", out=tmp_path / str(n), steps=5, seed=seed, **TEACHER).digest
               for n, seed in enumerate((0, 0, 1))]
    assert digests[0] == digests[1] != digests[2]


def test_checkpoint_frequency_does_not_change_the_result(home: Path, tmp_path: Path) -> None:
    options = {"data": home / "data", "steps": 6, **TEACHER}
    digests = {train(out=tmp_path / str(every), checkpoint_every=every, **options).digest for every in (1, 4)}
    assert len(digests) == 1


def test_auto_precision_does_not_survive_into_the_manifest(home: Path, tmp_path: Path) -> None:
    options = {**TEACHER, "precision": "auto"}
    teacher = train(data=home / "data", out=tmp_path / "t", steps=2, **options)
    assert teacher.manifest.config["precision"] in ("fp32", "bf16", "fp16")


def test_any_task_trains_with_the_same_command(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 10, 64)
    image = (rng.random((64, 3, 32, 32)) * 0.2 + label[:, None, None, None] / 12).astype(np.float32)
    splits = {"train": np.arange(48), "test": np.arange(48, 64)}
    write_arrays(tmp_path / "data", {"image": image, "label": label}, splits)
    teacher = train(data=tmp_path / "data", out=tmp_path / "t", task="image-classification", dim=16, depth=1, heads=2,
                    steps=3, batch=8, precision="fp32")
    metrics = json.loads(teacher.path("metrics.json").read_text())
    assert set(metrics) == {"params", "labels", "objective", "test"}
    assert 0 <= metrics["test"]["accuracy"] <= 1


def test_a_run_from_a_teacher_may_recompute_its_activations(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = watch_recomputing(monkeypatch)
    options = {"data": home / "data", "init": home / "teacher", "steps": 2, "batch": 4, "precision": "fp32"}
    plain = train(out=tmp_path / "plain", **options)
    assert not ran
    saving = train(out=tmp_path / "saving", activation_checkpointing=True, **options)
    assert ran
    assert saving.path("model.safetensors").read_bytes() == plain.path("model.safetensors").read_bytes()
    assert saving.json("model.json") == plain.json("model.json")
    with pytest.raises(ConfigError, match="sizes are those of --init: leave out depth"):
        train(out=tmp_path / "deep", depth=1, activation_checkpointing=True, **options)


def test_a_dataset_of_another_task_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no array 'image'"):
        train(data=home / "data", out=tmp_path / "t", task="image-classification", steps=1)
    with pytest.raises(ConfigError, match="no such task"):
        train(data=home / "data", out=tmp_path / "t", task="nothing", steps=1)
    assert not (tmp_path / "t").exists()
