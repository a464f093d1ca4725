"""`compare` as the gate of continual learning: models on several domains, forgetting, canaries and their overrides."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fmdeploy.artifact import open_artifact
from fmdeploy.cli import group
from fmdeploy.command import Outcome
from fmdeploy.compare.canary import canary
from fmdeploy.compare.compare import compare
from fmdeploy.config import StageConfig
from fmdeploy.data.split import split
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import ConfigError, DataError, InputError
from fmdeploy.manifest import Kind
from fmdeploy.teacher.train import train
from support.training_data import TEACHER, write_scenes

LIMITS: dict[str, Any] = {"min_samples": 10, "min_slice_samples": 10, "min_groups": 2, "metric": "drivable_iou"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains, a teacher that knows the road, and one that has hardly begun."""
    root = tmp_path_factory.mktemp("domains")
    write_scenes(root / "road", sequences=64)
    write_scenes(root / "port", seed=1, sequences=64)
    options = {"data": root / "road", **TEACHER}
    train(out=root / "good", steps=40, lr=5e-3, **options)
    train(out=root / "begun", steps=1, lr=1e-6, **options)
    return root


def run(home: Path, candidate: str, deployed: str, **options: Any) -> Outcome:
    return compare(candidate=home / candidate, deployed=home / deployed, data=[home / "road", home / "port"],
                   **{**LIMITS, **options})


def test_the_same_model_passes_in_every_domain(home: Path, tmp_path: Path) -> None:
    found = run(home, "good", "good", out=tmp_path / "check")
    assert found.exit_code == 0
    table = found.data["comparison"]
    assert {row["domain"] for row in table} == {"road", "port"}
    assert {row["slice"] for row in table if row["domain"] == "port"} >= {None, "weather=clear"}
    overall = [row for row in table if row["slice"] is None]
    assert all(row["old"] == row["new"] > 0.5 and row["result"] == "pass" for row in overall)
    assert found.data["continual"]["mean_forgetting"] == 0.0
    assert found.lines[0].split() == ["domain", "slice", "old", "new", "drop", "result"]
    manifest = open_artifact(tmp_path / "check", Kind.CHECK).manifest
    assert set(manifest.inputs) == {"candidate", "deployed", "data0", "data1"}


def test_a_model_that_lost_a_domain_is_stopped_and_says_how_much(home: Path) -> None:
    found = run(home, "begun", "good")
    assert found.exit_code == 1
    lost = found.data["continual"]["forgetting"]
    assert set(lost) == {"road", "port"}
    assert all(each["low"] > 0.1 for each in lost.values())
    failed = [row["name"] for row in found.data["gates"] if row["result"] == "fail" and row["slice"] is None]
    assert failed == [f"candidate drivable_iou drop vs deployed in {name}" for name in ("road", "port")]


def test_a_new_domain_is_gained_not_forgotten(home: Path) -> None:
    """The candidate is the better one: both domains gain; what was known before is held against the trivial guess."""
    found = run(home, "good", "begun", new=["port"]).data["continual"]
    assert set(found["forgetting"]) == {"road"}
    assert found["gain"]["port"]["low"] > 0.1
    assert found["forward_transfer"]["port"]["value"] < 0  # an untrained model knows less than copying the sensors


def test_a_domain_may_have_its_own_budget(home: Path) -> None:
    found = run(home, "begun", "good", domain_drop=["port=0.99"], max_slice_drop=0.99)
    results = {row["domain"]: row["result"] for row in found.data["comparison"] if row["slice"] is None}
    assert results == {"road": "fail", "port": "pass"}


@pytest.fixture
def canaries(home: Path, tmp_path: Path) -> Path:
    """Two samples of the road's test split that the good teacher solves; the scenes have no rare cases of their own."""
    return write_canaries(tmp_path, data=f"{open_artifact(home / 'road').digest}:test")


def write_canaries(folder: Path, **more: Any) -> Path:
    """A canary file."""
    path = folder / "canaries.json"
    path.write_text(json.dumps({"metric": "drivable_iou", "floor": 0.5, "cases": ["s060/3", "s061/5"], **more}))
    return path


def test_one_lost_canary_blocks_whatever_the_average(home: Path, canaries: Path, tmp_path: Path) -> None:
    generous = {"max_drop": 0.99, "max_slice_drop": 0.99, "canary": canaries}
    assert run(home, "good", "good", **generous).exit_code == 0
    found = run(home, "begun", "good", **generous)
    assert found.exit_code == 1
    row = next(row for row in found.data["gates"] if row["name"] == "canary cases lost")
    assert (row["result"], row["value"]) == ("fail", 2.0)
    assert "s060/3" in row["reason"]
    assert [case["is_solved"] for case in found.data["canaries"]] == [False, False]

    half = run(home, "begun", "good", **generous, accept=["s060/3"], because="label is wrong, see ticket 7",
               out=tmp_path / "half")
    assert half.exit_code == 1
    both = run(home, "begun", "good", **generous, accept=["s060/3", "s061/5"], because="labels are wrong, ticket 7",
               out=tmp_path / "accepted")
    assert both.exit_code == 0
    config = open_artifact(tmp_path / "accepted", Kind.CHECK).manifest.config  # the lineage knows
    assert (config["accept"], config["because"]) == (["s060/3", "s061/5"], "labels are wrong, ticket 7")
    assert config["canaries"]["floor"] == 0.5
    assert any("lost canary accepted: s060/3" in line for line in both.lines)


def test_overrides_are_explicit_and_never_stale(home: Path, canaries: Path, tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"accept": ["s060/3"], "out": tmp_path / "out", "canary": canaries}
    with pytest.raises(ConfigError, match="by name and with a reason"):
        run(home, "good", "good", **wanted)
    with pytest.raises(ConfigError, match="is accepted as lost, but is not"):
        run(home, "good", "good", **wanted, because="just in case")
    with pytest.raises(ConfigError, match="--because says why"):
        run(home, "good", "good", **wanted, because="          ")
    with pytest.raises(ConfigError, match="--accept needs --canary"):
        run(home, "good", "good", **{**wanted, "canary": None}, because="just in case")
    with pytest.raises(ConfigError, match="written into the lineage: --accept needs --out"):
        run(home, "begun", "good", **{**wanted, "out": None}, because="just in case")
    assert not (tmp_path / "out").exists()


def test_a_canary_is_judged_in_the_domain_that_it_was_chosen_from(home: Path, tmp_path: Path) -> None:
    """Both domains have samples of these names, as recordings of one seed do."""
    kept = {}
    for name in ("road", "port"):
        found = run(home, "begun", "good", canary=write_canaries(
            tmp_path, data=f"{open_artifact(home / name).digest}:test"))
        kept[name] = found.data["canaries"]
        row = next(row for row in found.data["gates"] if row["name"] == "canary cases lost")
        assert row["n_samples"] == sum(case["was_solved"] for case in kept[name])
    assert [case["case"] for case in kept["road"]] == [case["case"] for case in kept["port"]]
    assert [case["old"] for case in kept["road"]] != [case["old"] for case in kept["port"]]
    with pytest.raises(DataError, match=r"s060/3 is a sample of several domains \(found road, port\)"):
        run(home, "good", "good", canary=write_canaries(tmp_path))
    with pytest.raises(DataError, match="the canaries are of other data than is compared"):
        run(home, "good", "good", canary=write_canaries(tmp_path, data=f"{'0' * 64}:test"))


def test_canaries_that_the_deployed_model_never_solved_prove_nothing(home: Path, canaries: Path) -> None:
    found = run(home, "good", "begun", canary=canaries)
    row = next(row for row in found.data["gates"] if row["name"] == "canary cases lost")
    assert (row["result"], found.exit_code) == ("not measured", 1)


@pytest.mark.parametrize(("content", "error", "message"), [
    ("{", DataError, "is not JSON"), ("[]", DataError, "is not a canary set"),
    pytest.param("[" * 10**5, DataError, "too deep", id="deep"),
    ('{"metric": "iou", "floor": 0.2, "cases": ["a/1"], "cases": ["a/2"]}', DataError, "duplicate key"),
    ('{"metric": "iou", "floor": NaN, "cases": ["a/1"]}', DataError, "NaN is not JSON"),
    ('{"metric": "iou", "floor": 0.2, "cases": []}', ConfigError, "at least 1 item"),
    ('{"metric": "iou", "floor": 0.2, "cases": ["a/1", "a/1"]}', ConfigError, "names a case twice"),
    ('{"metric": "speed", "floor": 0.2, "cases": ["s060/3"]}', ConfigError, "no such metric"),
    ('{"metric": "iou", "floor": 0.2, "cases": ["s000/3"]}', DataError, "not among the evaluated samples"),
])
def test_bad_canaries_are_told(home: Path, tmp_path: Path, content: str, error: type[Exception], message: str) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(error, match=message):
        run(home, "good", "good", canary=tmp_path / "c.json", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_compared_is_told(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="models are evaluated here: name the data"):
        compare(candidate=home / "good", deployed=home / "good")
    with pytest.raises(ConfigError, match="no such domain.*road, port"):
        run(home, "good", "good", new=["moon"])
    with pytest.raises(ConfigError, match="is no limit of a domain"):
        run(home, "good", "good", domain_drop=["port=much"])
    with pytest.raises(ConfigError, match="no such metric"):
        run(home, "good", "good", metric="speed")
    with pytest.raises(ConfigError, match="no such slice axis.*scenario"):
        run(home, "good", "good", slices=["wether"])
    with pytest.raises(ConfigError, match="has two limits"):
        run(home, "good", "good", domain_drop=["port=0.1", "port=0.9"])
    with pytest.raises(ConfigError, match="a tier is part of a BUNDLE or a CHECK"):
        run(home, "good", "good", tier="fp32")
    shutil.copytree(home / "road", tmp_path / "copy")
    with pytest.raises(ConfigError, match="two domains are the same DATASET"):
        compare(candidate=home / "good", deployed=home / "good", data=[home / "road", tmp_path / "copy"], **LIMITS)
    made = run(home, "good", "good", out=tmp_path / "check")
    with pytest.raises(ConfigError, match="compares two CHECKs without --data, or two models"):
        compare(candidate=Path(made.data["path"]), deployed=home / "good", data=[home / "road"])
    with pytest.raises(ConfigError, match="CHECKs are compared by the metric of their budgets"):
        compare(candidate=Path(made.data["path"]), deployed=Path(made.data["path"]), metric="iou")


class Forged(StageConfig):
    """Configuration of a CHECK that no check wrote."""


@pytest.mark.parametrize(("tier", "metric", "message"), [
    (None, "iou", "no tier served there.*Name one with --tier"), ("int8", "speed", "no such metric"),
    ("int4", "iou", "has no evaluation of the tier")])
def test_a_check_that_says_nothing_is_told(tmp_path: Path, tier: str | None, metric: str, message: str) -> None:
    def build(draft: Draft) -> None:
        draft.write_json("evaluation.int8.json", {})
        draft.write_json("check.json", {"preferred": {"tier": tier}, "task": "bev-occupancy", "metric": metric})

    check = produce(tmp_path / "check", Kind.CHECK, stage="check", config=Forged(), inputs={}, build=build)
    with pytest.raises(InputError, match=message):
        compare(candidate=check.root, deployed=check.root)


def test_training_samples_prove_nothing(home: Path) -> None:
    found = run(home, "good", "good", split="train")
    rows = {row["name"]: row["result"] for row in found.data["gates"] if row["name"].startswith("evaluation samples")}
    name = "evaluation samples seen in training or calibration in"
    assert rows == {f"{name} road": "fail", f"{name} port": "pass"}
    assert found.exit_code == 1
    assert found.data["path"] is None  # nothing was written
    assert found.lines[-1] == "NOT PASSED"


def test_another_split_of_the_training_data_proves_nothing(home: Path, tmp_path: Path) -> None:
    """Its test split holds scenes that `good` was trained on; a join leaves every scene in its split."""
    split(data=home / "road", out=tmp_path / "again", seed=5)
    road = open_artifact(home / "road")

    def copied(draft: Draft) -> None:
        for name in road.manifest.files:
            shutil.copyfile(road.path(name), draft.path(name))

    produce(tmp_path / "both", Kind.DATASET, stage="data join", config=Forged(), inputs={"data0": road}, build=copied)
    seen = {}
    for name in ("again", "both"):
        found = compare(candidate=home / "good", deployed=home / "good", data=[tmp_path / name], **LIMITS)
        row = next(row for row in found.data["gates"] if row["name"].startswith("evaluation samples seen"))
        seen[name] = row["result"], row["reason"], found.exit_code
    assert seen["again"] == (
        "not measured", f"it was made from dataset {road.digest[:12]}, another split of the same recordings", 1)
    assert seen["both"] == ("pass", "", 0)


def test_the_command_line(home: Path) -> None:
    words = ["compare", str(home / "begun"), str(home / "good"), "--data", str(home / "road"), "--json",
             "--min-samples", "10", "--min-groups", "2", "--metric", "drivable_iou"]
    answer = CliRunner().invoke(group, words)
    assert answer.exit_code == 1
    rows = json.loads(answer.stdout)["comparison"]
    assert {"domain", "slice", "metric", "old", "new", "drop", "limit", "result"} <= set(rows[0])


def test_rare_cases_become_canaries(tmp_path: Path) -> None:
    from fmdeploy.data.record import record
    from fmdeploy.task import load_task

    data = record(out=tmp_path / "data", simulations=10, scenarios=["merge"], workers=1, seed=3)
    found = canary(data=data.root, out=tmp_path / "canaries.json", per_label=3, floor=0.1)
    from fmdeploy.data.format import open_dataset

    samples = load_task("bev-occupancy").samples(open_dataset(data.root), "test")
    rare = {name for name, label in zip(samples.ids, samples.slices["rare"], strict=True) if label != "none"}
    assert set(found.data["cases"]) <= rare
    assert found.data["cases"]
    assert json.loads((tmp_path / "canaries.json").read_text()) == {**found.data, "cases": list(found.data["cases"])}
    with pytest.raises(ConfigError, match="no such slice axis"):
        canary(data=data.root, out=tmp_path / "x.json", axis="moon")
