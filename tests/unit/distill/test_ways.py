"""The ways to distil: several teachers, moved and reduced maps, learned weights, features first and heads later."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fmdeploy.artifact import Artifact
from fmdeploy.config import StageConfig
from fmdeploy.data.format import open_dataset
from fmdeploy.data.trained_on import check_training_data
from fmdeploy.distill.assemble import Assembly, assemble
from fmdeploy.distill.config import DistillConfig
from fmdeploy.distill.distill import distill
from fmdeploy.distill.sources import sources_of
from fmdeploy.draft import produce
from fmdeploy.errors import ConfigError, FmdeployError, LeakageError
from fmdeploy.evaluate.evaluation import Evaluation
from fmdeploy.export.export import export
from fmdeploy.manifest import Kind, Parent
from fmdeploy.models.saved import load_model, save_model
from fmdeploy.quantize.quantize import quantize
from fmdeploy.task import load_task
from fmdeploy.teacher.cache import cache
from fmdeploy.teacher.train import train
from fmdeploy.training.loop import Tensors, fit
from support.training_data import STUDENT, TEACHER, write_scenes

TASK = load_task("bev-occupancy")
SMALL = STUDENT | {"steps": 3}
BOTH = ("one", "two")


class _Plain(StageConfig):
    """No options."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, teachers `one`, `two` and the headless `ssl`, and the FEATURES of each."""
    folder = tmp_path_factory.mktemp("ways")
    data = write_scenes(folder / "data")
    train(data=folder / "data", out=folder / "one", steps=2, **TEACHER)
    train(data=folder / "data", out=folder / "two", steps=3, seed=1, **TEACHER)
    sizes = {name: value for name, value in TEACHER.items() if name not in ("precision", "batch")}
    torch.manual_seed(0)
    produce(folder / "ssl", Kind.TEACHER, stage="pre-train", config=_Plain(), inputs={"data": data},
            build=lambda draft: save_model(draft, TASK.teacher(sizes), task="bev-occupancy", role="teacher", name="",
                                           options=sizes, heads=False))
    for name in (*BOTH, "ssl"):
        cache(teacher=folder / name, data=folder / "data", out=folder / f"{name}-features", precision="fp32")
    return folder


def _distill(home: Path, out: Path, teachers: tuple[str, ...] = ("one",), *, live: bool = False, **changes: Any) -> Artifact:
    names = [name.partition("=")[0] for name in teachers]
    features = [] if live else [home / f"{name}-features" for name in names]
    options: dict[str, Any] = {"teacher": [f"{home}/{name}" for name in teachers], "features": features, "labels": 0.5}
    return distill(data=home / "data", out=out, **(options | SMALL | changes))


def _log(student: Artifact) -> list[dict[str, float]]:
    return [json.loads(line) for line in student.path("log.jsonl").read_text().splitlines()]


def _parts(student: Artifact) -> set[str]:
    return set(_log(student)[0]) - {"step", "lr", "grad_norm", "loss"}


def _assert_same_curve(one: Artifact, other: Artifact) -> None:
    for ours, theirs in zip(_log(one), _log(other), strict=True):
        for name in set(ours) - {"grad_norm"}:  # float16 in the cache: the gradient feels it most
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-5), (ours["step"], name)


def test_two_teachers_cached_and_live_give_the_same_curve(home: Path, tmp_path: Path) -> None:
    cached = _distill(home, tmp_path / "c", ("one", "two=3"))
    assert _parts(cached) == {"labels", "logits", "features.teacher0", "features.teacher1"}
    _assert_same_curve(cached, _distill(home, tmp_path / "l", ("one", "two=3"), live=True))
    assert set(cached.inputs) == {"data", "teacher", "teacher2", "features", "features2"}
    metrics = cached.json("metrics.json")
    assert metrics["teachers"] == 2
    assert cached.manifest.config["teacher_shares"] == [0.25, 0.75]
    best = metrics["teacher"]["val"]["iou"]
    assert metrics["retention"]["val"] == (pytest.approx(metrics["val"]["iou"] / best) if best else None)
    assert Evaluation.load(cached, "teacher_evaluation").data == Evaluation.load(cached, "evaluation").data


def test_one_cache_may_hold_both_teachers(home: Path, tmp_path: Path) -> None:
    cache(teacher=[home / "one", home / "two"], data=home / "data", out=tmp_path / "f", precision="fp32")
    together = _distill(home, tmp_path / "t", ("one", "two"), features=[tmp_path / "f"])
    _assert_same_curve(together, _distill(home, tmp_path / "a", ("one", "two")))
    assert set(together.inputs) == {"data", "teacher", "teacher2", "features"}


def test_each_teacher_may_have_a_loss_of_its_own(home: Path, tmp_path: Path) -> None:
    student = _distill(home, tmp_path / "s", BOTH, teacher_logits="each", loss=["logits", "kd=0.5", "attention"])
    assert _parts(student) == {f"{name}.teacher{n}" for name in ("logits", "kd", "attention") for n in (0, 1)}


def test_every_loss_at_once_and_two_layers(home: Path, tmp_path: Path) -> None:
    from fmdeploy.distill.losses.registry import LOSSES, MAP_LOSSES

    student = _distill(home, tmp_path / "s", live=True, loss=list(LOSSES), set=["whitened.how=zca", "kd.temperature=4"],
                       layers=["tokens:trunk", "backbone.trunk:stem"])
    layers = ("tokens", "backbone.trunk")
    assert _parts(student) == {*(set(LOSSES) - set(MAP_LOSSES)), *(f"{n}.{layer}" for n in MAP_LOSSES for layer in layers)}
    assert all(np.isfinite(value) for record in _log(student) for value in record.values())


def test_a_teacher_without_heads_gives_no_logits(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"its outputs were never trained.*--loss features=1 --labels 0"):
        _distill(home, tmp_path / "s", ("ssl",))
    beside = _distill(home, tmp_path / "b", ("one", "ssl"))
    assert _parts(beside) == {"labels", "logits", "features.teacher0", "features.teacher1"}


def test_features_alone_train_the_trunk_and_then_labels_the_heads(home: Path, tmp_path: Path) -> None:
    trunk = _distill(home, tmp_path / "trunk", ("ssl",), labels=0.0, loss=["features", "cosine"])
    loaded = load_model(trunk)
    assert not loaded.recipe.heads
    assert not trunk.has("evaluation.json")
    metrics = trunk.json("metrics.json")
    assert metrics["heads"] is False
    assert metrics["labels"]["samples"] == 0
    assert "test" not in metrics
    torch.manual_seed(0)
    fresh = TASK.student("cnn", {"stem_width": 8, "width": 8}).state_dict()
    found = loaded.module.state_dict()
    assert torch.equal(found["head.weight"], fresh["head.weight"])
    assert not torch.equal(found["stem.0.0.weight"], fresh["stem.0.0.weight"])
    for stage, given in ((quantize, {"student": tmp_path / "trunk"}), (export, {"model": tmp_path / "trunk"})):
        with pytest.raises(FmdeployError, match=r"trained by features alone.*--init") as caught:
            stage(**given, data=home / "data", out=tmp_path / "q")
        assert "\n" not in str(caught.value)
    options = {name: value for name, value in SMALL.items() if name not in ("stem_width", "width")}
    whole = distill(data=home / "data", out=tmp_path / "whole", init=tmp_path / "trunk", labels=0.5, **options)
    assert load_model(whole).recipe.heads
    assert load_model(whole).recipe.options == loaded.recipe.options
    assert whole.has("evaluation.json")
    assert set(whole.inputs) == {"data", "init"}
    with pytest.raises(ConfigError, match="sizes are those of --init"):
        distill(data=home / "data", out=tmp_path / "w", init=tmp_path / "trunk", **SMALL)
    with pytest.raises(ConfigError, match="is another network"):
        distill(data=home / "data", out=tmp_path / "w", init=tmp_path / "trunk", student="vit", **options)


@pytest.mark.parametrize("changes", [
    {"augment": ["flip,translate,crop"]}, {"progressive": 0.5}, {"augment": ["translate"], "progressive": 0.5},
])
def test_moved_and_reduced_answers_are_the_same_from_cache_and_live(
    home: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    cached = _distill(home, tmp_path / "c", **changes)
    _assert_same_curve(cached, _distill(home, tmp_path / "l", live=True, **changes))


def test_the_distance_to_the_live_teacher_is_measured(home: Path, tmp_path: Path) -> None:
    student = _distill(home, tmp_path / "s", augment=["flip", "translate", "crop"], steps=1)
    found = student.json("metrics.json")["augmentation"]["teacher0"]
    assert set(found) == {"none", "flip", "translate", "crop"}
    assert set(found["none"]) == {"bev", "scene", "feature.tokens"}
    for name, row in found["none"].items():
        assert row["cosine"] > 0.999, name
        assert row["relative_error"] < 5e-3, name
    for transform in ("flip", "translate", "crop"):
        assert found[transform]["feature.tokens"]["relative_error"] > 0.01, transform
        assert -1 <= found[transform]["bev"]["cosine"] < 0.999, transform


def test_the_first_steps_see_small_maps(home: Path, tmp_path: Path) -> None:
    made = _assembled(home, tmp_path, progressive=0.5, steps=4, augment=("flip",))
    sizes = [made.batches(step, 0)["inputs"]["lidar"].shape[-1] for step in range(4)]
    assert sizes == [32, 32, 64, 64]
    batch = made.batches(0, 0)
    assert batch["teacher0"]["feature.tokens"].shape[-1] == 4
    assert batch["targets"]["bev"].shape[-1] == batch["teacher0"]["bev"].shape[-1] == 32


@pytest.mark.parametrize(("changes", "message"), [
    ({"student": "vit", "stem_width": None, "width": 16, "dim": 16, "depth": 1}, "works at its own resolution only"),
    ({"progressive_factor": 5}, "multiples of 5"),
])
def test_a_student_of_one_resolution_is_refused(
    home: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _distill(home, tmp_path / "s", progressive=0.5, **changes)


def _assembled(home: Path, folder: Path, **changes: Any) -> Assembly:
    folder.mkdir(exist_ok=True)
    options: dict[str, Any] = SMALL | changes
    config = DistillConfig(data=home / "data", out=folder, teacher=(home / "one",), features=(home / "one-features",),
                           **options)
    return assemble(config, sources_of(config), folder=folder / "work", log=folder / "log.jsonl")


def test_learned_weights_survive_a_stop_and_are_dropped_afterwards(home: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"weighting": "learned", "steps": 6, "checkpoint_every": 2, "progressive": 0.5,
                               "augment": ("flip", "translate")}
    whole = _assembled(home, tmp_path / "whole", **changes)
    fit(whole.job, whole.batches.config)
    stopped = _assembled(home, tmp_path / "stopped", **changes)
    _stop_after(stopped, 5)
    with pytest.raises(KeyboardInterrupt):
        fit(stopped.job, stopped.batches.config)
    resumed = _assembled(home, tmp_path / "stopped", **changes)
    assert fit(resumed.job, resumed.batches.config).steps == 2
    ours, theirs = resumed.job.model.state_dict(), whole.job.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert theirs["log_variance"].shape == (3,)
    assert (theirs["log_variance"] != 0).all()
    student = _distill(home, tmp_path / "s", weighting="learned")
    assert not [name for name in student.tensors("model.safetensors") if "variance" in name or "projector" in name]


def _stop_after(made: Assembly, calls: int) -> None:
    """Let the loss raise as if the user had pressed ctrl-C in call number `calls`."""
    losses, seen = made.job.losses, iter(range(100))

    def stopping(model: torch.nn.Module, batch: Tensors) -> dict[str, torch.Tensor]:
        if next(seen) == calls - 1:
            raise KeyboardInterrupt
        return losses(model, batch)

    object.__setattr__(made.job, "losses", stopping)


def test_a_teacher_that_saw_the_test_scenes_is_refused(home: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / "same", sequences=32)  # the first 16 are those of `data`, all of them for training
    write_scenes(tmp_path / "other", seed=9)
    assert open_dataset(tmp_path / "same").digest != open_dataset(home / "data").digest
    for name in ("same", "other"):
        train(data=tmp_path / name, out=tmp_path / f"{name}-teacher", steps=1, **TEACHER)
    given: dict[str, Any] = {"data": home / "data", "labels": 0.5, **SMALL, "steps": 1}
    with pytest.raises(LeakageError, match=r"trained on 4 of the sequences that the run is judged on"):
        distill(out=tmp_path / "s", teacher=tmp_path / "same-teacher", teacher_data=tmp_path / "same", **given)
    with pytest.raises(ConfigError, match="nothing that this run builds on was trained on this dataset"):
        distill(out=tmp_path / "s", teacher=home / "one", teacher_data=tmp_path / "same", **given)
    digest = open_dataset(tmp_path / "other").digest
    for shown, state in (([], "not checked"), ([tmp_path / "other"], "disjoint")):
        student = distill(out=tmp_path / state, teacher=tmp_path / "other-teacher", teacher_data=shown, **given)
        assert student.json("metrics.json")["teacher_data"] == {digest: state}
        copied = Evaluation.load(student, "teacher_evaluation")  # made anew: the teacher's own is of other scenes
        assert copied.data == Evaluation.load(student, "evaluation").data


def test_what_a_dataset_was_split_from_was_not_trained_on(home: Path) -> None:
    data = open_dataset(home / "data")
    before = Parent(kind=Kind.DATASET, stage="data record", digest="0" * 64)
    split = Parent(kind=Kind.DATASET, stage="data split", digest=data.digest, inputs={"data": before})
    base = Parent(kind=Kind.TEACHER, stage="teacher train", digest="1" * 64, inputs={"data": before})
    own, tuned = SimpleNamespace(inputs={"data": split}), SimpleNamespace(inputs={"data": split, "init": base})
    assert check_training_data([own], data, []) == {}  # type: ignore[list-item]
    assert check_training_data([tuned], data, []) == {before.digest: "not checked"}  # type: ignore[list-item]


@pytest.mark.parametrize("changes", [{"loss": ["logits"]}, {"labels": 0.0}])
def test_importance_weights_need_a_loss_against_labels(home: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    text = "importance = true\n[weights.scenario]\nmerge = 3.0\n"
    (tmp_path / "natural.toml").write_text(text)
    (tmp_path / "mixture.toml").write_text(f'representation = "mixture"\n{text}')
    with pytest.raises(ConfigError, match="learn at natural frequency"):
        _distill(home, tmp_path / "s", mixture=tmp_path / "natural.toml", **changes)
    with pytest.raises(ConfigError, match="importance weights belong to the loss against labels, and none is read"):
        _distill(home, tmp_path / "s", mixture=tmp_path / "mixture.toml", **changes)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(("changes", "message"), [
    ({"set": ["kd.temperature=2"]}, "not in use"), ({"set": ["logit.x=2"]}, "nothing known"),
    ({"set": ["features"]}, "is not a setting"), ({"layers": ["tokens"]}, "no pair of layers"),
    ({"layers": ["nothing:trunk"]}, "the cache holds no features of 'nothing'"),
    ({"layers": ["tokens:nothing"]}, "no such layer"), ({"augment": ["spin"]}, "no such augmentation"),
    ({"loss": ["labels"], "labels": 0.0}, "no part of the loss has weight"),
    ({"teacher": ["nowhere=x"]}, "no usable weight"),
    ({"loss": ["kd"], "set": ['kd.weights={"bve": 1}']}, "no such output"),
])
def test_bad_options_are_refused_in_one_line(home: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        _distill(home, tmp_path / "s", **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "s").exists()
