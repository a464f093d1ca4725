"""`check`, `compare` and `run` from end to end on a real small bundle."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.command import Outcome
from fmdeploy.compare.compare import compare
from fmdeploy.data.format import open_dataset
from fmdeploy.draft import Draft
from fmdeploy.errors import ArtifactError, ConfigError, DataError, FrameError
from fmdeploy.evaluate.evaluation import Evaluation, data_key, evaluate
from fmdeploy.manifest import Kind
from fmdeploy.runtime.check.check import check
from fmdeploy.runtime.run import run
from support.bundles import budgets, fp32_model, int8_model, make_bundle, run_model
from support.toy_task import ToyTask, make_dataset

TASK = "support.toy_task:ToyTask"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "data").root


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle").root


@pytest.fixture(scope="module")
def checked(bundle: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One check with nothing special about it; what only reads it need not measure again."""
    return _check(bundle, data, tmp_path_factory.mktemp("checked") / "c")


def _check(bundle: Path, data: Path, out: Path, **options: Any) -> Outcome:
    return check(bundle=bundle, data=data, out=out, task=TASK, runs=options.pop("runs", 100), **options)


def _rows(found: Outcome) -> dict[str, dict[str, Any]]:
    return {row["name"] + (f" [{row['slice']}]" if row["slice"] else ""): row for row in found.data["gates"]}


def test_check_passes_and_writes_everything(checked: Outcome) -> None:
    assert checked.exit_code == 0, checked.lines
    artifact = open_artifact(checked.data["path"], Kind.CHECK)
    for name in ("check.json", "gates.json", "junit.xml", "summary.md", "latency.json", "metrics.json",
                 "evaluation.fp32.safetensors", "evaluation.int8-cpu.json", "examples.fp32.safetensors"):
        assert artifact.has(name), name
    assert ElementTree.fromstring(artifact.path("junit.xml").read_text())[0].get("failures") == "0"
    assert "passed" in artifact.path("summary.md").read_text()
    assert len(artifact.json("latency.json")["fp32"]["ms"]) == 100
    assert set(artifact.inputs) == {"bundle", "data"}


def test_accuracy_is_that_of_the_bare_model(checked: Outcome, data: Path) -> None:
    artifact = open_artifact(checked.data["path"])
    opened = open_dataset(data)
    task = ToyTask()
    metric = task.metrics()[0]
    for variant, model in (("fp32", fp32_model()), ("int8-cpu", int8_model())):
        bare = evaluate(functools.partial(run_model, model), task.samples(opened, "test"), task.metrics(),
                        data=data_key(opened.digest, "test"))
        stored = Evaluation.load(artifact, f"evaluation.{variant}")
        assert np.array_equal(stored.stats[metric.name], bare.stats[metric.name])
        assert artifact.json("check.json")["values"][variant]["iou"] == bare.value(metric)


def test_a_measurement_is_never_taken_from_the_shelf(bundle: Path, data: Path, tmp_path: Path) -> None:
    first = _check(bundle, data, tmp_path / "c")
    with pytest.raises(ArtifactError, match="already exists, and a measurement is not repeated unasked"):
        _check(bundle, data, tmp_path / "c")
    assert open_artifact(tmp_path / "c").digest == first.data["digest"]
    second = _check(bundle, data, tmp_path / "c", again=True)
    assert second.exit_code == 0
    assert second.data["digest"] != first.data["digest"], "other latencies"
    assert second.data["path"] == str(tmp_path / "c")
    assert open_artifact(tmp_path / "c").digest == second.data["digest"]
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_check_says_what_it_was_measured_with(checked: Outcome) -> None:
    request = open_artifact(checked.data["path"]).manifest.config
    assert request["processor"]
    assert request["num_cpus"] >= 1
    assert set(request["packages"]) == {"onnxruntime", "numpy"}


def test_only_a_check_is_replaced(bundle: Path, data: Path, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "b").digest
    with pytest.raises(ArtifactError, match=r"is not a CHECK that may be replaced \(expected CHECK of check, found BUNDLE"):
        _check(bundle, data, tmp_path / "b", again=True)
    assert open_artifact(tmp_path / "b").digest == other
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(ArtifactError):
        _check(bundle, data, tmp_path / "mine", again=True)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "x"


def test_a_failed_repetition_keeps_the_old_check(bundle: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                 ) -> None:
    first = _check(bundle, data, tmp_path / "c", runs=30, tiers=("fp32",))

    def broken(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("fmdeploy.runtime.check.check.measure_latency", broken)
    with pytest.raises(KeyboardInterrupt):
        _check(bundle, data, tmp_path / "c", runs=30, again=True)
    assert open_artifact(tmp_path / "c").digest == first.data["digest"]
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_failing_gate_exits_1_and_the_check_is_still_written(bundle: Path, data: Path, tmp_path: Path) -> None:
    strict = tmp_path / "strict.toml"
    strict.write_text(budgets(max_drop_vs_fp32=0.001).to_toml().replace("p50_ms = 500.0", "p50_ms = 0.001"))
    found = _check(bundle, data, tmp_path / "c", budgets=strict)
    rows = _rows(found)
    assert found.exit_code == 1
    assert rows["int8-cpu iou drop vs fp32"]["result"] == "fail"
    assert rows["fp32 latency p50"]["result"] == "fail"
    assert found.data["preferred"]["tier"] == "fp32", "INT8 outside its budget does not serve"
    assert "not preferred" in found.data["preferred"]["reason"]
    assert open_artifact(tmp_path / "c").has("junit.xml")


def test_missing_teacher_is_not_measured(bundle: Path, data: Path, tmp_path: Path) -> None:
    limits = tmp_path / "b.toml"
    limits.write_text(budgets(max_drop_vs_teacher=0.5).to_toml())
    found = _check(bundle, data, tmp_path / "c", budgets=limits)
    row = _rows(found)["fp32 iou drop vs teacher"]
    assert (row["result"], found.exit_code) == ("not measured", 1)


@pytest.mark.parametrize("right_data", [True, False])
def test_teacher_counts_only_on_the_same_data(data: Path, tmp_path: Path, right_data: bool) -> None:
    opened, task = open_dataset(data), ToyTask()
    key = data_key(opened.digest if right_data else "0" * 64, "test")
    teacher = evaluate(lambda inputs: run_model(fp32_model(), inputs), task.samples(opened, "test"), task.metrics(),
                       data=key)
    bundle = make_bundle(tmp_path / "b", change=lambda draft: teacher.save(draft, "teacher_evaluation"),
                         limits=budgets(max_drop_vs_teacher=0.5))
    found = _check(bundle.root, data, tmp_path / "c")
    row = _rows(found)["fp32 iou drop vs teacher"]
    assert (row["result"], row["value"]) == (("pass", 0.0) if right_data else ("not measured", None))
    assert found.exit_code == (0 if right_data else 1)


def test_slices_are_gated(bundle: Path, data: Path, tmp_path: Path) -> None:
    limits = tmp_path / "b.toml"
    limits.write_text(budgets(max_slice_drop=0.3, min_slice_samples=20).to_toml())
    found = _check(bundle, data, tmp_path / "c", budgets=limits)
    rows = {name: row for name, row in _rows(found).items() if row["slice"]}
    assert {row["slice"] for row in rows.values()} == {"weather=clear", "weather=fog", "scenario=merge", "scenario=exit",
                                                       "rare"}
    rare = rows["int8-cpu iou drop vs fp32 [rare]"]
    assert (rare["result"], rare["required"]) == ("not measured", False)
    assert found.exit_code == 0
    limits.write_text(budgets(max_slice_drop=0.3, min_slice_samples=20, required_slices=("rare",)).to_toml())
    assert _check(bundle, data, tmp_path / "c2", budgets=limits).exit_code == 1


def test_too_few_samples_are_not_measured(bundle: Path, data: Path, tmp_path: Path) -> None:
    limits = tmp_path / "b.toml"
    limits.write_text(budgets(min_samples=97).to_toml())
    found = _check(bundle, data, tmp_path / "c", budgets=limits)
    row = _rows(found)["int8-cpu iou drop vs fp32"]
    assert (row["result"], row["reason"], found.exit_code) == ("not measured", "96 samples, 97 needed", 1)


def test_too_few_runs_have_no_p99(bundle: Path, data: Path, tmp_path: Path) -> None:
    found = _check(bundle, data, tmp_path / "c", runs=50)
    assert [name for name, row in _rows(found).items() if row["result"] == "not measured"] == ["int8-cpu latency p99"] or \
        [name for name, row in _rows(found).items() if row["result"] == "not measured"] == ["fp32 latency p99"]
    assert found.exit_code == 1


def test_budget_of_another_machine_is_not_measured(bundle: Path, data: Path, tmp_path: Path) -> None:
    limits = tmp_path / "b.toml"
    limits.write_text(budgets().to_toml().replace("p50_ms", 'machine = "riscv128"\np50_ms'))
    found = _check(bundle, data, tmp_path / "c", budgets=limits)
    missing = {row["name"].split(" ", 1)[1] for row in _rows(found).values() if row["result"] == "not measured"}
    assert missing == {"latency p50", "latency p99", "memory peak"}


def test_refused_tier_fails_the_check(data: Path, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", models={"fp32": fp32_model()})
    found = _check(bundle.root, data, tmp_path / "c", tiers=("int8-cpu", "fp32"))
    rows = _rows(found)
    assert rows["int8-cpu self-test"]["result"] == "fail"
    assert "no model.int8-cpu.onnx" in rows["int8-cpu iou drop vs fp32"]["reason"]
    assert found.data["preferred"]["tier"] == "fp32"
    assert found.exit_code == 1
    by_default = _check(bundle.root, data, tmp_path / "c2")
    assert by_default.exit_code == 0, "a bundle that never had INT8 is checked for what it has"
    assert set(by_default.data["tiers"]) == {"fp32"}


def test_a_layer_of_zeros_is_said(checked: Outcome, data: Path, tmp_path: Path) -> None:
    model = onnx.load_from_string(fp32_model())
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "w2")
    weight.raw_data = bytes(len(weight.raw_data))
    bundle = make_bundle(tmp_path / "b", models={"fp32": model.SerializeToString()})
    found = _check(bundle.root, data, tmp_path / "c", runs=30, tiers=("fp32",))
    remark = "fp32: tensor 'w2' is a weight of nothing but zeros (1 of 4): that layer adds nothing"
    assert remark in found.data["notes"]
    assert remark in (tmp_path / "c" / "summary.md").read_text()
    assert not any("zeros" in note for note in checked.data["notes"]), "control"


def test_bad_requests(bundle: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose a target"):
        _check(bundle, data, tmp_path / "c", target="orin")
    limits = tmp_path / "b.toml"
    limits.write_text(budgets(metric="mAP").to_toml())
    with pytest.raises(ConfigError, match="no such metric"):
        _check(bundle, data, tmp_path / "c", budgets=limits)
    with pytest.raises(ArtifactError, match="other inputs and outputs than the task"):
        check(bundle=bundle, data=data, out=tmp_path / "c", task="bev-occupancy")
    with pytest.raises(ArtifactError, match="does not say which task"):
        check(bundle=bundle, data=data, out=tmp_path / "c")
    with pytest.raises(DataError, match="no split"):
        _check(bundle, data, tmp_path / "c", split="validation")
    assert not (tmp_path / "c").exists()


def _split(out: Path, data: Path, **splits: np.ndarray[Any, Any]) -> Artifact:
    """The toy dataset's samples in groups of four, in other splits."""
    from fmdeploy.data.from_arrays import write_arrays

    samples = ToyTask().samples(open_dataset(data), "test")
    inputs, targets = samples.batch(np.arange(len(samples)))
    return write_arrays(out, {**inputs, **targets}, splits, groups=np.arange(len(samples)) // 4)


SEEN = "evaluation samples seen in training or calibration"


@pytest.mark.parametrize(("split", "result"), [("test", "pass"), ("val", "pass"), ("train", "fail"), ("all", "fail")])
def test_training_data_do_not_pass(data: Path, tmp_path: Path, split: str, result: str) -> None:
    """A bundle that descends from the dataset, checked on every split of it."""
    numbers = np.arange(96)
    known = _split(tmp_path / "d", data, train=numbers[:32], val=numbers[32:64], test=numbers[64:])
    bundle = make_bundle(tmp_path / "b", parents={"data": known})
    found = _check(bundle.root, known.root, tmp_path / "c", split=split)
    row = _rows(found)[SEEN]
    assert (row["result"], row["n_samples"]) == (result, 96 if split == "all" else 32)
    assert found.exit_code == (0 if result == "pass" else 1)
    if result == "fail":
        assert row["value"] == 32
        assert "32 samples are of the training split, such as train-0/0" in row["reason"]
        assert found.data["preferred"]["tier"] is not None


def test_calibration_samples_do_not_pass(data: Path, tmp_path: Path) -> None:
    """Whatever split they stand in now, and whatever dataset they came from."""
    seen = ToyTask().samples(open_dataset(data), "test").ids[5]
    bundle = make_bundle(tmp_path / "b", change=lambda draft: draft.write_json("calibration.json", {"samples": [seen]}))
    found = _check(bundle.root, data, tmp_path / "c")
    assert found.exit_code == 1
    assert _rows(found)[SEEN]["reason"] == f"1 samples are of the calibration set, such as {seen}"


def test_teacher_is_found_for_the_validation_split_too(data: Path, tmp_path: Path) -> None:
    numbers = np.arange(96)
    known = _split(tmp_path / "d", data, train=numbers[:0], val=numbers[:48], test=numbers[48:])
    opened, task = open_dataset(known.root), ToyTask()

    def with_teacher(draft: Draft) -> None:
        for split, name in (("test", "teacher_evaluation"), ("val", "teacher_validation")):
            evaluate(lambda inputs: run_model(fp32_model(), inputs), task.samples(opened, split), task.metrics(),
                     data=data_key(opened.digest, split)).save(draft, name)

    bundle = make_bundle(tmp_path / "b", change=with_teacher, limits=budgets(max_drop_vs_teacher=0.5))
    found = _check(bundle.root, known.root, tmp_path / "c", split="val")
    row = _rows(found)["fp32 iou drop vs teacher"]
    assert (row["result"], row["n_samples"]) == ("pass", 48)


@pytest.mark.parametrize(("dull", "result"), [(0, "pass"), (2, "fail")])
def test_frames_that_the_guards_reject_do_not_count_silently(data: Path, tmp_path: Path, dull: int, result: str) -> None:
    """Two black camera frames of 96 give outputs and a good score, but on the road the runtime would call them invalid."""
    from fmdeploy.data.from_arrays import write_arrays

    samples = ToyTask().samples(open_dataset(data), "test")
    inputs, targets = samples.batch(np.arange(96))
    inputs["camera"][:dull] = 0
    numbers = np.arange(96)
    write_arrays(tmp_path / "d", {**inputs, **targets}, {"test": numbers}, groups=numbers // 4)
    found = _check(make_bundle(tmp_path / "b").root, tmp_path / "d", tmp_path / "c")
    row = _rows(found)["fp32 share of clean frames not valid"]
    assert (row["result"], row["value"], row["limit"]) == (result, pytest.approx(dull / 96), 0.01)
    assert found.exit_code == (0 if result == "pass" else 1)
    assert found.data["tiers"]["fp32"]["flags"].get("LOW_INFORMATION", 0) == dull, "the example pictures do not count"


def test_equal_samples_are_no_frozen_sensor(data: Path, tmp_path: Path) -> None:
    from fmdeploy.data.from_arrays import write_arrays

    samples = ToyTask().samples(open_dataset(data), "test")
    inputs, targets = samples.batch(np.repeat(np.arange(4), 24))
    write_arrays(tmp_path / "d", {**inputs, **targets}, {"test": np.arange(96)}, groups=np.arange(96) // 4)
    found = _check(make_bundle(tmp_path / "b").root, tmp_path / "d", tmp_path / "c")
    assert _rows(found)["fp32 share of clean frames not valid"]["value"] == 0
    assert found.exit_code == 0


def test_compare_does_not_mix_threads_or_metrics(checked: Outcome, bundle: Path, data: Path, tmp_path: Path) -> None:
    _check(bundle, data, tmp_path / "two", threads=2, runs=30, tiers=("fp32",))
    limits = tmp_path / "b.toml"
    limits.write_text(budgets(metric="scene_accuracy").to_toml())
    _check(bundle, data, tmp_path / "other", budgets=limits, runs=30, tiers=("fp32",))
    options: dict[str, Any] = {"deployed": Path(checked.data["path"]), "tier": "fp32", "min_samples": 20, "min_slice_samples": 20}
    threads = compare(candidate=tmp_path / "two", out=tmp_path / "c1", max_latency_ratio=100.0, **options)
    row = _rows(threads)["latency p50 ratio, candidate / deployed"]
    assert (row["result"], row["reason"]) == ("not measured", "the checks ran with 2 and 1 threads")
    metrics = compare(candidate=tmp_path / "other", out=tmp_path / "c2", **options)
    assert [(row["result"], row["reason"]) for row in metrics.data["gates"]] == [
        ("not measured", "the checks gate different metrics: scene_accuracy and iou")]
    assert (threads.exit_code, metrics.exit_code) == (1, 1)


def test_compare(checked: Outcome, data: Path, tmp_path: Path) -> None:
    deployed = Path(checked.data["path"])
    worse = make_bundle(tmp_path / "b2", models={"fp32": fp32_model(), "int8-cpu": int8_model(seed=1)})
    _check(worse.root, data, tmp_path / "worse")
    options: dict[str, Any] = {"deployed": deployed, "min_samples": 20, "min_slice_samples": 20}
    same = compare(candidate=deployed, out=tmp_path / "same", **options)
    assert same.exit_code == 0
    assert same.data["values"]["candidate"] == same.data["values"]["deployed"]
    assert {row["slice"] for row in same.data["gates"]} >= {None, "weather=fog", "scenario=merge"}
    bad = compare(candidate=tmp_path / "worse", out=tmp_path / "bad", tier="int8-cpu", **options)
    assert bad.exit_code == 1
    assert bad.data["gates"][0]["result"] == "fail"
    slow = compare(candidate=deployed, out=tmp_path / "slow", max_latency_ratio=0.5, **options)
    assert slow.exit_code == 1
    assert [row["name"] for row in slow.data["gates"] if row["result"] == "fail"] == [
        "latency p50 ratio, candidate / deployed"]
    assert open_artifact(tmp_path / "bad", Kind.CHECK).has("junit.xml")


def test_compare_refuses_other_data(checked: Outcome, bundle: Path, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "d2", seed=4).root
    _check(bundle, other, tmp_path / "two", runs=30, tiers=("fp32",))
    with pytest.raises(DataError, match="different data"):
        compare(candidate=Path(checked.data["path"]), deployed=tmp_path / "two", out=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_run_writes_predictions_and_records(bundle: Path, data: Path, tmp_path: Path) -> None:
    found = run(bundle=bundle, data=data, out=tmp_path / "p", task=TASK, tiers=("fp32",))
    samples = ToyTask().samples(open_dataset(data), "test")
    records = [json.loads(line) for line in (tmp_path / "p" / "frames.jsonl").read_text().splitlines()]
    predictions = load_file(tmp_path / "p" / "predictions.safetensors")
    assert found.data["frames"] == len(records) == len(samples) == len(predictions["bev"])
    assert tuple(record["id"] for record in records) == samples.ids
    inputs, _ = samples.batch(np.arange(len(samples)))
    assert np.array_equal(predictions["bev"], run_model(fp32_model(), inputs)["bev"])


def test_run_stops_at_a_bad_frame_and_leaves_nothing(bundle: Path, tmp_path: Path) -> None:
    from fmdeploy.data.from_arrays import write_arrays

    opened = ToyTask().samples(open_dataset(make_dataset(tmp_path / "good").root), "test")
    inputs, targets = opened.batch(np.arange(20))
    inputs["lidar"][7, 0, 0, 0] = np.nan
    write_arrays(tmp_path / "bad", {**inputs, **targets}, {"test": np.arange(20)})
    with pytest.raises(FrameError, match=r"sample test-7/0: NOT_FINITE lidar: 1 of 2048"):
        run(bundle=bundle, data=tmp_path / "bad", out=tmp_path / "p", task=TASK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "good"]
    found = run(bundle=bundle, data=tmp_path / "bad", out=tmp_path / "p", task=TASK, keep_going=True)
    assert found.data["invalid"] == 1
    predictions = load_file(tmp_path / "p" / "predictions.safetensors")
    assert np.isnan(predictions["bev"][7]).all()
    assert np.isfinite(predictions["bev"][8]).all()
    with pytest.raises(ArtifactError, match="already exists"):
        run(bundle=bundle, data=tmp_path / "bad", out=tmp_path / "p", task=TASK)
    with pytest.raises(DataError, match="the runtime refuses an evaluation sample: NOT_FINITE"):
        _check(bundle, tmp_path / "bad", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_nan_metric_is_not_measured(data: Path, tmp_path: Path) -> None:
    """Labels without a single vehicle and a model that sees none: 0/0."""
    from fmdeploy.data.from_arrays import write_arrays

    samples = ToyTask().samples(open_dataset(data), "test")
    inputs, targets = samples.batch(np.arange(len(samples)))
    silent = fp32_silent()
    targets["bev"][:] = 0
    write_arrays(tmp_path / "empty", {**inputs, **targets}, {"test": np.arange(len(samples))})
    bundle = make_bundle(tmp_path / "b", models={"fp32": silent, "int8-cpu": silent})
    found = _check(bundle.root, tmp_path / "empty", tmp_path / "c")
    row = _rows(found)["int8-cpu iou drop vs fp32"]
    assert (row["result"], found.exit_code) == ("not measured", 1)
    assert found.data["values"]["fp32"]["iou"] is None


def fp32_silent() -> bytes:
    """The toy model with a bias that silences `bev`."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load_from_string(fp32_model())
    model.graph.initializer.append(numpy_helper.from_array(np.full(5, -100, np.float32), "bias"))
    next(node for node in model.graph.node if "bev" in node.output).input.append("bias")
    raw: bytes = model.SerializeToString()
    return raw


def test_full_disk_leaves_nothing(bundle: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from fmdeploy.errors import NoSpaceError

    def full(self: Draft, name: str, value: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Draft, "write_json", full)
    with pytest.raises(NoSpaceError):
        _check(bundle, data, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
