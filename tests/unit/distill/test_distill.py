"""Distillation: from the cache as from a live teacher, projector thrown away, labels counted in simulations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.data.format import open_dataset
from fmdeploy.distill.distill import distill
from fmdeploy.errors import ArtifactError, ConfigError
from fmdeploy.evaluate.evaluation import Evaluation
from fmdeploy.manifest import Kind
from fmdeploy.models import num_parameters
from fmdeploy.models.saved import load_model
from fmdeploy.task import load_task
from fmdeploy.teacher.cache import cache
from fmdeploy.teacher.train import train
from fmdeploy.training.labelled import labelled_index
from support.training_data import STUDENT, TEACHER, write_scenes

TASK = load_task("bev-occupancy")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, `teacher` and `features`."""
    folder = tmp_path_factory.mktemp("distill")
    write_scenes(folder / "data")
    train(data=folder / "data", out=folder / "teacher", steps=6, **TEACHER)
    cache(teacher=folder / "teacher", data=folder / "data", out=folder / "features", per_shard=8, precision="fp32")
    return folder


def _distill(home: Path, out: Path, **changes: Any) -> Artifact:
    options = {"data": home / "data", "teacher": home / "teacher", "out": out, "labels": 0.5} | STUDENT | changes
    return distill(**{key: value for key, value in options.items() if value is not None})


def _log(student: Artifact) -> list[dict[str, float]]:
    return [json.loads(line) for line in student.path("log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def cached(home: Path) -> Artifact:
    """A student from the cache."""
    return _distill(home, home / "cached", features=home / "features")


def test_the_cache_and_a_live_teacher_give_the_same_loss_curve(home: Path, cached: Artifact, tmp_path: Path) -> None:
    live = _distill(home, tmp_path / "live")
    for ours, theirs in zip(_log(cached), _log(live), strict=True):
        assert set(ours) == {"step", "lr", "grad_norm", "loss", "labels", "logits", "features"}
        for name in ("loss", "labels", "logits", "features"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), (ours["step"], name)


def test_the_projector_is_thrown_away(cached: Artifact) -> None:
    names = set(cached.tensors("model.safetensors"))
    assert not [name for name in names if "projector" in name or "student" in name]
    student = load_model(cached).module
    assert set(student.state_dict()) == names
    assert cached.json("metrics.json")["params"] == num_parameters(student)
    assert num_parameters(student) == num_parameters(TASK.student("cnn", {"stem_width": 8, "width": 8}))


def test_it_carries_what_later_stages_need(home: Path, cached: Artifact) -> None:
    metrics, teacher = cached.json("metrics.json"), open_artifact(home / "teacher")
    assert metrics["labels"] == {"fraction": 0.5, "samples": 18, "of": 36}
    assert metrics["teacher"]["params"] == teacher.json("metrics.json")["params"]
    assert metrics["retention"]["test"] == pytest.approx(metrics["test"]["iou"] / metrics["teacher"]["test"]["iou"])
    for name in ("evaluation", "validation"):
        copied = Evaluation.load(cached, f"teacher_{name}")
        original = Evaluation.load(teacher, name)
        assert copied.data == original.data == Evaluation.load(cached, name).data
        assert np.array_equal(copied.stats["iou"], original.stats["iou"])
    assert cached.has("examples.safetensors")
    assert not [name for name in cached.manifest.files if "checkpoint" in name]
    assert {role: parent.kind for role, parent in cached.inputs.items()} == {
        "data": Kind.DATASET, "teacher": Kind.TEACHER, "features": Kind.FEATURES,
    }


def test_the_stored_evaluation_is_what_the_stored_weights_do(home: Path, cached: Artifact) -> None:
    from fmdeploy.evaluate.evaluation import evaluate
    from fmdeploy.models import predictor

    loaded, data = load_model(cached), open_dataset(home / "data")
    again = evaluate(predictor(loaded.module, TASK.io), TASK.samples(data, "test"), TASK.metrics())
    stored = Evaluation.load(cached, "evaluation")
    assert np.array_equal(again.stats["iou"], stored.stats["iou"])


def test_without_a_teacher_it_is_supervised_training(home: Path, tmp_path: Path) -> None:
    student = _distill(home, tmp_path / "scratch", teacher=None)
    assert set(_log(student)[0]) == {"step", "lr", "grad_norm", "loss", "labels"}
    assert set(student.inputs) == {"data"}
    assert "teacher" not in student.json("metrics.json")


def test_labels_are_whole_simulations(home: Path) -> None:
    samples = TASK.samples(open_dataset(home / "data"), "train")
    for fraction, expected in ((0.5, 3), (0.1, 1), (1.0, 6), (0.0, 0)):
        chosen = labelled_index(samples, fraction, seed=0)
        groups = np.asarray(samples.groups)
        assert len(np.unique(groups[chosen])) == expected
        assert set(chosen) == set(np.flatnonzero(np.isin(groups, groups[chosen])))
    draws = {tuple(labelled_index(samples, 0.5, seed)) for seed in range(8)}
    assert len(draws) > 3


def test_a_teacher_can_teach_without_any_labels(home: Path, tmp_path: Path) -> None:
    student = _distill(home, tmp_path / "s", features=home / "features", labels=0.0, steps=3)
    assert set(_log(student)[0]) == {"step", "lr", "grad_norm", "loss", "logits", "features"}


def test_the_vit_learns_from_the_same_features(home: Path, tmp_path: Path) -> None:
    options = {"student": "vit", "stem_width": None, "width": 16, "dim": 16, "depth": 1, "steps": 3}
    assert "features" in _log(_distill(home, tmp_path / "s", features=home / "features", **options))[0]


def test_it_builds_the_cache_when_asked(home: Path, cached: Artifact, tmp_path: Path) -> None:
    student = _distill(home, tmp_path / "s", build_cache=tmp_path / "features", steps=2)
    assert open_artifact(tmp_path / "features", Kind.FEATURES).digest == student.inputs["features"].digest


def test_a_foreign_cache_is_refused_and_nothing_is_written(home: Path, tmp_path: Path) -> None:
    train(data=home / "data", out=tmp_path / "other", steps=2, **TEACHER)
    with pytest.raises(ArtifactError, match="made from another teacher"):
        _distill(home, tmp_path / "s", teacher=tmp_path / "other", features=home / "features")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(("options", "message"), [
    ({"teacher": None, "features": "features"}, "give --teacher too"),
    ({"student": "nobody"}, "no such student"),
    ({"task": "image-classification"}, "trained for another task"),
    ({"labels": 1.5}, "less than or equal to 1"),
    ({"loss": ["nothing=1"]}, "no such loss"),
    ({"accumulation": 4}, "cannot be cut into equal parts"),
])
def test_bad_options_are_refused_in_one_line(
    home: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    options = {key: home / value if key == "features" else value for key, value in options.items()}
    with pytest.raises(ConfigError, match=message) as caught:
        _distill(home, tmp_path / "s", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "s").exists()


def test_the_same_request_gives_the_same_digest(home: Path, cached: Artifact, tmp_path: Path) -> None:
    assert _distill(home, tmp_path / "again", features=home / "features").digest == cached.digest


def test_the_projector_pools_equal_windows_as_the_adaptive_kernel_would() -> None:
    import torch

    from fmdeploy.distill.projector import Pooled

    map_BCHW = torch.randn(2, 6, 16, 16)
    for grid in ((8, 8), (16, 16), (5, 7)):
        expected = torch.nn.functional.adaptive_avg_pool2d(map_BCHW, grid)
        torch.testing.assert_close(Pooled((16, 16), grid)(map_BCHW), expected)
