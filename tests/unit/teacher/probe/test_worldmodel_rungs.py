"""World-model rungs find planted facts: a model that knows the future, one that copies, one that guesses."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.data.format import open_dataset
from fmdeploy.data.raster import cell_centres
from fmdeploy.task import load_task
from fmdeploy.teacher.objectives.worldmodel import WorldModel, WorldModelConfig
from fmdeploy.teacher.probe import worldmodel_scores as scores
from fmdeploy.teacher.probe.base import Bench, Result
from fmdeploy.teacher.probe.loading import open_subject
from fmdeploy.teacher.probe.subject import Subject
from fmdeploy.teacher.probe.view import NotMeasuredError, SplitChoice, View
from fmdeploy.teacher.probe.worldmodel import (
    ActionSensitivity,
    FutureCalibration,
    MultiStep,
    OneStep,
    PlanningCost,
    WorldRung,
)
from fmdeploy.teacher.probe.worldmodel_futures import Codes, Futures, told
from fmdeploy.teacher.probe.worldmodel_plan import CANDIDATES, costs, deviations, footprints
from fmdeploy.teacher.train import train
from support.blinking import SETTINGS, SIZES, write_blinking
from support.training_data import write_scenes

RUNGS: tuple[WorldRung, ...] = (OneStep(), MultiStep(), FutureCalibration(), PlanningCost())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny driving scenes in `data`, and `driver` with a world model `told` of the motion and a kept `flow`."""
    folder = tmp_path_factory.mktemp("worldrungs")
    write_scenes(folder / "data", sequences=64)
    write_blinking(folder / "driver", "driver")
    actions = (*SETTINGS, "worldmodel.actions=true")
    train(data=folder / "driver", out=folder / "told", objective=("worldmodel",), set=actions, steps=120, **SIZES)
    train(data=folder / "driver", out=folder / "flow", objective=("flow",), steps=2, set=("flow.width=8",), **SIZES)
    return folder


def view_of(data: Path, teacher: Artifact | None = None) -> View:
    task = load_task("bev-occupancy")
    subject = Subject("TEACHER", task) if teacher is None else open_subject(teacher)
    return View(subject, SplitChoice(task, open_dataset(data), {}))


def planted(home: Path, kind: str) -> View:
    """A view whose world model is known to say: the `truth`, the `present`, or `noise`."""
    view = view_of(home / "data")
    samples: Any = view.samples("test")
    index, offsets = view.index("test"), tuple(range(1, 9))
    truth = samples.occupancy(index, offsets)
    now = samples.occupancy(index, (0,))
    said = {"truth": truth, "present": np.broadcast_to(now, truth.shape),
            "noise": np.random.default_rng(0).random(truth.shape)}[kind].astype(np.float32)
    view.once("futures of worldmodel", lambda: Futures(offsets, index, said, truth, truth, now))
    plan_codes(view, {"true": 0.5, "others": 0.5, "zero": 0.5}, said)
    return view


def plan_codes(view: View, nats: dict[str, float], said: Any) -> None:
    config = WorldModelConfig(codes=2, code_dim=2, hidden=8, width=8, depth=1, heads=1, actions=True)
    task = load_task("bev-occupancy")
    teacher = task.teacher({"dim": 16, "depth": 1, "heads": 2, "stem_width": 8, "width": 16})
    view.once(("kept", "worldmodel"), lambda: WorldModel(task, teacher, config, steps=1))
    noise = np.random.default_rng(1).normal(0, 0.01, (len(said), 8))
    for motion, mean in nats.items():
        planted_codes = Codes(mean + noise, np.full(noise.shape, 0.9), said)
        view.once(("codes", motion), functools.partial(Codes, **vars(planted_codes)))


def row(rung: WorldRung, view: View) -> Result:
    found = rung.measure(Bench(view))
    assert found.measured
    assert found.interval is not None
    assert found.interval.low <= found.interval.value <= found.interval.high
    return found


def value(rung: WorldRung, view: View, also: str = "") -> float:
    found = row(rung, view)
    interval = found.also[also] if also else found.interval
    assert interval is not None
    return interval.value


def test_a_model_that_knows_the_future_is_perfect(home: Path) -> None:
    view = planted(home, "truth")
    assert value(OneStep(), view) == value(MultiStep(), view) == 1
    assert value(MultiStep(), view, "iou@+1.6s") == 1
    assert value(MultiStep(), view, "gain over persistence") > 0.2
    assert value(FutureCalibration(), view) < 1e-5
    assert value(FutureCalibration(), view, "brier") == 0
    for name in ("", "pearson", "spearman, seen"):
        assert value(PlanningCost(), view, name) == pytest.approx(1)


def test_a_model_that_copies_the_present_is_persistence(home: Path) -> None:
    view = planted(home, "present")
    for rung in (OneStep(), MultiStep()):
        assert value(rung, view, "gain over persistence") == 0
        assert value(rung, view) == value(rung, view, "persistence") < 1
    assert value(FutureCalibration(), view, "brier") == value(FutureCalibration(), view, "brier of persistence") > 0
    assert value(PlanningCost(), view) == value(PlanningCost(), view, "spearman of persistence") < 1


def test_a_model_that_guesses_is_worth_nothing(home: Path) -> None:
    view = planted(home, "noise")
    occupied = view.once("futures of worldmodel", lambda: None).seen.mean()  # type: ignore[attr-defined]
    assert value(OneStep(), view) < 2 * occupied
    assert value(MultiStep(), view, "gain over persistence") < -0.2
    assert value(FutureCalibration(), view) == pytest.approx(0.5 - occupied, abs=0.01)
    assert abs(value(PlanningCost(), view)) < 0.2


@pytest.mark.parametrize("loss", [0.0, 0.3])
def test_action_sensitivity_is_what_others_actions_cost(home: Path, loss: float) -> None:
    view = planted(home, "truth")
    view._kept.pop(("codes", "others"))
    view._kept.pop(("kept", "worldmodel"))
    plan_codes(view, {"others": 0.5 + loss}, view.once("futures of worldmodel", lambda: None).said)  # type: ignore[attr-defined]
    found = row(ActionSensitivity(), view)
    assert found.interval is not None
    assert found.interval.value == pytest.approx(loss, abs=1e-9)
    assert found.also["nats lost to standing still"].value == pytest.approx(0, abs=1e-9)
    assert found.also["iou lost to others' actions"].value == 0


def test_a_trained_model_listens_to_the_driver(home: Path) -> None:
    view = view_of(home / "driver", open_artifact(home / "told"))
    found = row(ActionSensitivity(), view)
    assert found.interval is not None
    assert found.interval.low > 0.05
    one = row(OneStep(), view)
    assert one.also["code accuracy"].value > 0.9
    assert one.also["gain over persistence"].low > 0
    assert set(one.to_json()) >= {"metric", "value", "low", "high", "also", "reason"}


def test_without_a_world_model_or_actions_nothing_is_measured(home: Path) -> None:
    view = planted(home, "truth")
    view._kept.pop(("kept", "worldmodel"))
    deaf = WorldModelConfig(codes=2, code_dim=2, hidden=8, width=8, depth=1, heads=1)
    task = load_task("bev-occupancy")
    teacher = task.teacher({"dim": 16, "depth": 1, "heads": 2, "stem_width": 8, "width": 16})
    view.once(("kept", "worldmodel"), lambda: WorldModel(task, teacher, deaf, steps=1))
    with pytest.raises(NotMeasuredError, match="without actions"):
        ActionSensitivity().measure(Bench(view))
    for rung in RUNGS:
        with pytest.raises(NotMeasuredError, match="only a TEACHER keeps a world model"):
            rung.measure(Bench(view_of(home / "data")))


def test_a_kept_flow_is_judged_where_there_is_no_world_model(home: Path) -> None:
    view = view_of(home / "driver", open_artifact(home / "flow"))
    for rung in (MultiStep(), FutureCalibration(), PlanningCost()):
        try:
            found = rung.measure(Bench(view))
        except NotMeasuredError:
            pytest.fail(f"{rung.name} was not measured")
        assert found.measured or isinstance(rung, PlanningCost)
    assert view.once("futures of flow", lambda: None).said.shape[1:] == (3, 32, 32)  # type: ignore[attr-defined]
    with pytest.raises(NotMeasuredError, match="keeps no objective 'worldmodel'"):
        OneStep().measure(Bench(view))


def test_others_actions_are_those_of_another_simulation(home: Path) -> None:
    view = view_of(home / "driver")
    samples: Any = view.samples("test")
    index = view.index("test")
    assert (told(samples, index, "others") == samples.motion(np.roll(index, len(index) // 2), range(1, 9))).all()
    assert (samples.groups[index] != samples.groups[np.roll(index, len(index) // 2)]).all()
    assert not told(samples, index, "zero").any()


def test_the_threshold_is_the_one_that_the_probabilities_promise_most_for() -> None:
    rng = np.random.default_rng(0)
    chance = rng.beta(0.3, 2, 20_000)
    truth = rng.random(20_000) < chance
    iou = {t: (truth & (chance > t)).sum() / (truth | (chance > t)).sum() for t in scores.THRESHOLDS}
    assert iou[scores.best_threshold(chance)] > max(iou.values()) - 0.01
    assert scores.best_threshold(chance) < 0.5
    assert scores.best_threshold(truth.astype(float)) == pytest.approx(0.5)
    assert scores.best_threshold(np.zeros(5)) == pytest.approx(0.5)


def test_correlations_are_those_of_numpy_and_ties_share_their_rank() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 30, 4))
    y = y + x
    found = scores.Correlation().value(scores.correlation_rows(x, y).sum(0))
    assert float(found) == pytest.approx(np.corrcoef(x.ravel(), y.ravel())[0, 1])
    assert scores.ranks(np.array([[3.0, 1.0], [3.0, 7.0]])).tolist() == [[2.5, 1], [2.5, 4]]
    assert np.isnan(scores.Correlation().value(scores.correlation_rows(x, np.ones_like(x)).sum(0)))
    curved = scores.correlation_rows(scores.ranks(x), scores.ranks(np.exp(x)))
    assert float(scores.Correlation().value(curved.sum(0))) == pytest.approx(1)


def test_a_manoeuvre_costs_what_it_hits() -> None:
    offsets, names = tuple(range(1, 9)), list(CANDIDATES)
    way = dict(zip(names, deviations(offsets), strict=True))
    assert not way["keep"].any()
    np.testing.assert_allclose(way["brake"][-1], [-0.5 * 6 * 1.6**2, 0])
    np.testing.assert_allclose(way["left"][-1], [0, 4])
    centre = cell_centres()
    world = np.zeros((1, 8, 64, 64), np.float32)
    world[0, :, (np.abs(centre[..., 1] - 5.5) < 1) & (np.abs(centre[..., 0]) < 2)] = 1  # a car 5.5 m to the left
    price = dict(zip(names, costs(world, offsets)[0], strict=True))
    assert price["keep"] == price["brake"] == price["right"] == 0
    assert price["left"] > 5
    full = footprints(offsets, 64)[names.index("keep"), 0].sum()
    assert full == 8 * 4  # cells whose centre lies within 3.5 m ahead or behind and 2 m aside
    assert footprints(offsets, 32)[names.index("keep"), 0].sum() == full / 4
