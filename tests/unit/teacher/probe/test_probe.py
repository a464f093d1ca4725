"""`teacher probe` on real artifacts of every kind, and the curve over training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.command import Outcome
from fmdeploy.config import StageConfig
from fmdeploy.data.format import open_dataset
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import ArtifactError, ConfigError
from fmdeploy.evaluate.evaluation import Evaluation, evaluate
from fmdeploy.evaluate.report import report
from fmdeploy.export.onnx import export_onnx
from fmdeploy.manifest import Kind
from fmdeploy.models import predictor
from fmdeploy.models.additions import Addition, add
from fmdeploy.models.factory import make_teacher
from fmdeploy.models.saved import load_model, save_model
from fmdeploy.quantize.quantize import quantize
from fmdeploy.task import load_task
from fmdeploy.teacher.objectives.base import CollapsedError
from fmdeploy.teacher.probe.curve import ProbeCurve
from fmdeploy.teacher.probe.loading import fresh_module, open_subject, random_subject
from fmdeploy.teacher.probe.probe import probe
from fmdeploy.teacher.probe.registry import RUNGS
from fmdeploy.teacher.train import train
from support.training_data import TEACHER, write_scenes

FEW = {"train_samples": 24, "val_samples": 12, "test_samples": 12}
KEYS = {"metric", "value", "low", "high", "result", "unit", "higher_is_better", "n", "groups", "baseline", "gain",
        "also", "chosen", "reason"}
CHEAP = ("linear", "knn", "occupancy", "retrieval")


class Made(StageConfig):
    """Configuration of a made-up stage."""

    label: str = ""


def seal(out: Path, kind: Kind, build: Any, stage: str = "made", **inputs: Artifact) -> Artifact:
    """An artifact written by `build(draft)`."""
    return produce(out, kind, stage=stage, config=Made(), inputs=inputs, build=build)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, `teacher`, `backbone` (heads never trained), `student`, `quantized`, `bundle`, `check`."""
    folder = tmp_path_factory.mktemp("probe")
    write_scenes(folder / "data", sequences=32)
    train(data=folder / "data", out=folder / "teacher", steps=4, probe_every=2, **TEACHER)
    teacher, task = load_model(open_artifact(folder / "teacher")), load_task("bev-occupancy")
    seal(folder / "backbone", Kind.TEACHER, lambda draft: save_model(
        draft, teacher.module, task="bev-occupancy", role="teacher", name="", options={}, heads=False))
    small = task.student("cnn", {"stem_width": 8, "width": 8}).eval()
    student = seal(folder / "student", Kind.STUDENT, lambda draft: save_model(
        draft, small, task="bev-occupancy", role="student", name="cnn", options={}),
        data=open_artifact(folder / "data"))
    quantize(student=folder / "student", data=folder / "data", out=folder / "quantized",
             calibrator="max", calibration_samples=8, validation_samples=8)
    bundle = seal(folder / "bundle", Kind.BUNDLE, lambda draft: _bundle(draft, small, student), model=student)
    seal(folder / "check", Kind.CHECK, lambda draft: _check(draft, small, folder / "data"), "check", bundle=bundle)
    return folder


def _bundle(draft: Draft, small: Any, student: Artifact) -> None:
    export_onnx(small, load_task("bev-occupancy").io, draft.path("model.fp32.onnx"), opset=20)
    draft.write_json("model.json", student.json("model.json"))


def _check(draft: Draft, small: Any, data: Path) -> None:
    task = load_task("bev-occupancy")
    samples = task.samples(open_dataset(data), "test")
    exact = predictor(small, task.io)
    for tier, noise in (("fp32", 0.0), ("int8-cpu", 0.5)):
        def predict(inputs: Any, noise: float = noise) -> Any:
            rng = np.random.default_rng(0)
            return {k: v + np.asarray(noise * rng.normal(size=v.shape), np.float32) for k, v in exact(inputs).items()}

        evaluate(predict, samples, task.metrics()).save(draft, f"evaluation.{tier}")
    latency = {"n": 200, "p50_ms": 1.5, "p95_ms": 2.0, "p99_ms": 2.5, "max_ms": 3.0, "threads": 1}
    draft.write_json("check.json", {
        "metric": "iou", "preferred": {"tier": "int8-cpu", "reason": ""}, "latency": {"int8-cpu": latency},
        "peak_mib": {"int8-cpu": 77.0}, "conditions": {"tainted": [], "unknown": []},
    })


def run(home: Path, model: str, *rungs: str, **more: Any) -> Outcome:
    """`teacher probe` on few samples."""
    return probe(model=home / model, data=home / "data", rungs=rungs, **FEW, **more)


def test_a_teacher_gets_every_rung_or_its_reason(home: Path, tmp_path: Path) -> None:
    found = run(home, "teacher", out=tmp_path / "probe")
    optional = {"few-shot", "few-shot-5"}
    assert [name for name in RUNGS if name not in optional] == list(found.data)
    assert found.exit_code == 0
    for name, row in found.data.items():
        assert set(row) == KEYS
        assert row["result"] == ("measured" if row["value"] is not None else "not measured")
        assert bool(row["reason"]) == (row["value"] is None), name
    for name in ("linear", "knn", "segmentation", "occupancy", "forecasting", "transfer", "retrieval"):
        row = found.data[name]
        assert 0 <= row["low"] <= row["value"] <= row["high"] <= 1
        assert row["gain"]["value"] == pytest.approx(row["value"] - row["baseline"]["value"])
    assert "keeps no" in found.data["world-one-step"]["reason"]
    assert "--check" in found.data["latency-p50"]["reason"]
    artifact = open_artifact(tmp_path / "probe", Kind.PROBE)
    assert artifact.json("probe.json")["rungs"] == json.loads(json.dumps(found.data))
    assert artifact.read("table.md").decode().splitlines() == list(found.lines[:-1])
    assert run(home, "teacher", out=tmp_path / "again").lines[-1].split()[1] == artifact.digest[:12]


def test_a_rung_that_was_asked_for_and_not_measured_is_exit_code_1(home: Path) -> None:
    assert run(home, "teacher", "knn").exit_code == 0
    assert run(home, "teacher", "knn,memory").exit_code == 1
    with pytest.raises(ConfigError, match="no such rung"):
        run(home, "teacher", "knm")
    with pytest.raises(ArtifactError, match="another kind"):
        run(home, "data", "knn")


def test_a_backbone_without_trained_heads_has_features_and_no_outputs(home: Path) -> None:
    backbone, teacher = (run(home, model, "outputs", *CHEAP, random=False).data for model in ("backbone", "teacher"))
    assert "never trained" in backbone["outputs"]["reason"]
    assert teacher["outputs"]["value"] is not None
    for name in CHEAP:
        assert backbone[name] == teacher[name]
        assert backbone[name]["baseline"] is None


def test_students_and_their_int8_form_go_through(home: Path) -> None:
    student, quantized = (run(home, model, "outputs", *CHEAP) for model in ("student", "quantized"))
    assert student.exit_code == quantized.exit_code == 0
    for name in CHEAP:
        assert quantized.data[name]["baseline"] == student.data[name]["baseline"]
    inputs, _ = load_task("bev-occupancy").samples(open_dataset(home / "data"), "test").batch(np.arange(4))
    exact, rounded = (open_subject(open_artifact(home / model)).features for model in ("student", "quantized"))
    assert exact is not None
    assert rounded is not None
    plain, grid = exact(inputs).map_BDhw, rounded(inputs).map_BDhw
    assert plain.shape == grid.shape == (4, 8, 16, 16)
    error = float((plain - grid).square().mean() / plain.square().mean())
    assert 0 < error < 0.05  # the same map, on a grid


def test_a_bundle_has_outputs_only(home: Path) -> None:
    found = run(home, "bundle", "outputs", "linear", "few-shot").data
    student = run(home, "student", "outputs").data
    assert found["outputs"]["value"] == pytest.approx(student["outputs"]["value"], abs=1e-6)
    for name in ("linear", "few-shot"):
        assert found[name]["value"] is None
    assert "outputs only" in found["linear"]["reason"]
    with pytest.raises(ConfigError, match="no such tier"):
        run(home, "bundle", "outputs", tier="int8-cpu")


def test_deployment_rungs_are_read_from_a_check_of_this_very_model(home: Path) -> None:
    names, metric = ("latency-p50", "latency-p99", "memory", "int8-drop"), load_task("bev-occupancy").metrics()[0]
    for model in ("student", "bundle"):
        found = run(home, model, *names, check=home / "check").data
        assert [found[name]["value"] for name in names[:3]] == [1.5, 2.5, 77.0]
        assert [found[name]["unit"] for name in names] == ["ms", "ms", "MiB", "1"]
        exact, rounded = (Evaluation.load(open_artifact(home / "check"), f"evaluation.{tier}").value(metric)
                          for tier in ("fp32", "int8-cpu"))
        assert found["int8-drop"]["value"] == pytest.approx(1 - rounded / exact) != 0
    other = run(home, "teacher", *names, check=home / "check")
    assert other.exit_code == 1
    assert all("not made from this model" in row["reason"] for row in other.data.values())


def test_few_shot_trains_both_alike(home: Path) -> None:
    first, second = (run(home, "teacher", "few-shot", few_shot_steps=2).data["few-shot"] for _ in range(2))
    assert first == second
    assert first["metric"] == "iou"
    assert first["chosen"] == {"simulations": 1, "samples": 6, "steps": 2}
    assert first["gain"]["value"] == pytest.approx(first["value"] - first["baseline"]["value"])
    # The backbone and the very same one fine-tuned again: the weights of the subject were left alone.
    assert run(home, "teacher", "outputs").data == run(home, "teacher", "outputs").data


def test_the_random_network_is_the_same_architecture_and_depends_on_the_seed_alone(home: Path) -> None:
    teacher = open_artifact(home / "teacher")
    states = []
    for seed in (0, 1):
        subject = random_subject(teacher, seed=seed)
        assert subject is not None
        assert subject.module is not None
        states.append(subject.module.state_dict())
    again = fresh_module(load_task("bev-occupancy"), load_model(teacher).recipe, 0).state_dict()
    assert all(value.equal(again[name]) for name, value in states[0].items())
    assert any(not value.equal(again[name]) for name, value in states[1].items())
    assert {n: v.shape for n, v in again.items()} == {
        n: v.shape for n, v in load_model(teacher).module.state_dict().items()}


def test_an_imported_teacher_is_held_against_its_own_architecture(home: Path, tmp_path: Path) -> None:
    values = {"model_type": "dinov2", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 4, "num_channels": 3}
    task = load_task("bev-occupancy")
    module = add(make_teacher(task, "hf:", {"config": values}), [Addition(kind="adapter", options={"width": 2})])
    artifact = seal(tmp_path / "imported", Kind.TEACHER, lambda draft: save_model(
        draft, module, task="bev-occupancy", role="teacher", name="hf:", options={}, heads=False))
    random = random_subject(artifact)
    assert random is not None
    assert random.module is not None
    shapes = {name: value.shape for name, value in module.state_dict().items()}
    assert {name: value.shape for name, value in random.module.state_dict().items()} == shapes
    rows = probe(model=artifact.root, data=home / "data", rungs=("linear",), **FEW).data
    assert rows["linear"]["baseline"]["value"] is not None


def test_a_layer_that_says_nothing_is_refused(home: Path) -> None:
    with pytest.raises(ConfigError, match="with a token backbone are its tokens"):
        run(home, "teacher", "linear", layer="trunk")
    with pytest.raises(ConfigError, match="a BUNDLE has outputs only, and no layers"):
        run(home, "bundle", "outputs", layer="trunk")


def test_a_network_of_nan_has_a_reason_in_every_row(home: Path, tmp_path: Path) -> None:
    loaded = load_model(open_artifact(home / "teacher"))
    for value in loaded.module.parameters():
        value.data.fill_(float("nan"))
    spoilt = seal(tmp_path / "nan", Kind.TEACHER, lambda draft: save_model(
        draft, loaded.module, task="bev-occupancy", role="teacher", name="", options=loaded.recipe.options))
    found = probe(model=spoilt.root, data=home / "data", rungs=("outputs", *CHEAP, "few-shot"), few_shot_steps=2, **FEW)
    assert found.exit_code == 1
    assert {name: row["value"] for name, row in found.data.items()} == dict.fromkeys(("outputs", *CHEAP, "few-shot"))
    assert "fine-tuning diverged" in found.data["few-shot"]["reason"]
    assert "not finite" in found.data["linear"]["reason"]


def test_the_table_says_where_an_interval_is_too_narrow(home: Path) -> None:
    lines = run(home, "teacher", "outputs", "linear").lines
    assert "Intervals from fewer than 6 simulations are too narrow: outputs, linear" in lines


def test_the_report_shows_ladders_side_by_side_and_the_curve(home: Path, tmp_path: Path) -> None:
    for model in ("student", "quantized"):
        run(home, model, "outputs", "occupancy", "memory", out=tmp_path / model)
    outcome = report(artifacts=(home / "teacher", tmp_path / "student", tmp_path / "quantized"),
                     out=tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    section = page[page.index('<section id="probes">') : page.index('<section id="lineage">')]
    assert "student (STUDENT)" in section
    assert "quantized (QUANTIZED)" in section
    assert section.count("not measured: no CHECK was given") == 2
    assert "Probes over training. teacher" in section
    assert not any("probe" in line for line in outcome.data["not_given"])


def test_a_curve_over_training_starts_untrained_and_ends_with_the_last_step(home: Path) -> None:
    found = open_artifact(home / "teacher").json("probes.json")
    assert list(found) == ["knn", "linear", "occupancy"]
    for row in found.values():
        assert [point[0] for point in row["points"]] == [0, 2, 4]
        assert all(0 <= point[1] <= 1 for point in row["points"])


def test_a_curve_of_one_val_simulation_has_a_reason_and_no_numbers(tmp_path: Path) -> None:
    write_scenes(tmp_path / "data", sequences=16)
    found = train(data=tmp_path / "data", out=tmp_path / "teacher", steps=1, probe_every=1, **TEACHER)
    for row in found.json("probes.json").values():
        assert row["reason"] == "val has one simulation: none is left to judge by"
        assert [point[1:] for point in row["points"]] == [[None, None, None]] * 2


def test_probing_changes_no_weight_and_a_killed_run_ends_in_the_same_bytes(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_artifact(home / "teacher")
    plain = train(data=home / "data", out=tmp_path / "plain", steps=4, **TEACHER)
    assert plain.read("model.safetensors") == whole.read("model.safetensors")
    take = ProbeCurve.take

    def dies(curve: ProbeCurve, done: int) -> None:
        if done == 4:
            raise CollapsedError("killed")
        take(curve, done)

    monkeypatch.setattr(ProbeCurve, "take", dies)
    options = {"data": home / "data", "out": tmp_path / "killed", "steps": 4, "probe_every": 2, "checkpoint_every": 3,
               **TEACHER}
    with pytest.raises(CollapsedError):
        train(**options)
    monkeypatch.setattr(ProbeCurve, "take", take)
    assert train(**options).digest == whole.digest
