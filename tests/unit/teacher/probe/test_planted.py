"""Rungs on planted features: what is there is found, what is not there is not, and the intervals are honest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fmdeploy.task import load_task
from fmdeploy.teacher.probe.base import Bench, NotMeasuredError, Result
from fmdeploy.teacher.probe.dense import Forecasting, Occupancy, Segmentation
from fmdeploy.teacher.probe.knn import Knn
from fmdeploy.teacher.probe.labels import class_count, class_labels, dense_planes
from fmdeploy.teacher.probe.ladder import climb, measured
from fmdeploy.teacher.probe.linear import Linear
from fmdeploy.teacher.probe.outputs import Outputs
from fmdeploy.teacher.probe.retrieval import Retrieval
from fmdeploy.teacher.probe.ridge import Moments, fit_ridge
from fmdeploy.teacher.probe.transfer import Transfer
from support.probing import CLASSES, Planted, one_hot, places_of

SETS = Planted()
DENSE = (Segmentation, Occupancy, Forecasting)


def nothing(split: str) -> tuple[None, None]:
    """Noise."""
    return None, None


def classes(split: str) -> tuple[np.ndarray, None]:
    """The class in plain view, beside noise of the same size."""
    rng = np.random.default_rng(len(split))
    return np.concatenate([one_hot(SETS.scene[split], CLASSES), 0.3 * rng.normal(size=(SETS.counts[split], 4))], 1), None


def cells(split: str) -> tuple[None, np.ndarray]:
    """The cells in plain view."""
    return None, places_of(SETS.bev[split])


def value(result: Result) -> float:
    """The number of a row that was measured."""
    assert result.interval is not None, result.reason
    return result.interval.value


@pytest.mark.parametrize("rung", [Linear, Knn])
def test_a_class_that_is_there_is_found_and_noise_is_at_chance(rung: type) -> None:
    found = rung().measure(SETS.bench(classes, nothing))
    assert value(found) > 0.98
    assert found.baseline is not None
    assert found.gain is not None
    assert found.baseline.low < 1 / CLASSES < found.baseline.high
    assert found.gain.low > 0.5
    assert found.gain.value == pytest.approx(found.interval.value - found.baseline.value)
    assert found.interval.n_samples == 160
    assert found.interval.n_groups == 16


@pytest.mark.parametrize("rung", [Linear, Knn])
def test_samples_of_unknown_class_teach_and_count_nothing(rung: type) -> None:
    sets = Planted()
    for split, label_N in sets.scene.items():
        sets.scene[split] = np.where(np.arange(len(label_N)) % 4 == 0, -1, label_N)
    seen = {split: np.concatenate([one_hot(np.maximum(label_N, 0), CLASSES), np.ones((len(label_N), 1))], 1)
            for split, label_N in sets.scene.items()}
    found = rung().measure(sets.bench(lambda split: (seen[split], None)))
    assert value(found) == 1.0
    assert found.interval.n_samples == 120


@pytest.mark.parametrize(("label", "reason"), [
    (-1, "no sample of val has a class label"), (9, "a class label of val is 9, and there are 4 classes")])
def test_labels_that_are_no_classes_are_a_reason(label: int, reason: str) -> None:
    sets = Planted()
    sets.scene["val"][:] = label
    assert measured(Linear(), sets.bench(nothing)).reason == reason


def test_a_linear_probe_reads_what_is_linear_and_nothing_else() -> None:
    """The sign of a product of two features says nothing to a linear probe, though it is a function of them."""
    sets = Planted(counts={"train": 2000, "val": 400, "test": 1000})
    drawn = {split: np.random.default_rng(n).normal(size=(count, 2))
             for n, (split, count) in enumerate(sets.counts.items())}
    sets.scene = {split: (s.prod(1) > 0).astype(np.int64) for split, s in drawn.items()}
    plain = Linear().measure(sets.bench(lambda split: (drawn[split], None)))
    lifted = Linear().measure(sets.bench(lambda split: (np.sign(drawn[split].prod(1, keepdims=True)), None)))
    assert value(plain) < 0.7  # a line that cuts two of the four quadrants off is right two times in three at best
    assert value(lifted) == 1.0


@pytest.mark.parametrize("rung", DENSE)
def test_cells_that_are_there_are_found_and_noise_is_as_good_as_all_ones(rung: type) -> None:
    found = rung().measure(SETS.bench(cells, nothing))
    assert value(found) > 0.999
    # Thirty of a hundred cells are occupied: calling all of them occupied has an IoU of .3, and no guess does better.
    assert found.baseline is not None
    assert abs(found.baseline.value - 0.3) < 0.03
    assert found.gain is not None
    assert found.gain.low > 0.6


def test_each_plane_is_read_from_its_own_features() -> None:
    """Features with the cells of the ground alone leave vehicles at chance."""
    bench = SETS.bench(lambda split: (None, places_of(SETS.bev[split][:, 2:])))
    assert value(Segmentation().measure(bench)) > 0.999
    assert value(Occupancy().measure(bench)) < 0.35
    assert value(Forecasting().measure(bench)) < 0.35


def test_transfer_tells_a_code_that_holds_everywhere_from_one_that_holds_at_home() -> None:
    def turned(split: str) -> tuple[None, np.ndarray]:
        sign = np.where(np.isin(SETS.scenario[split], ("exit", "merge")), 1.0, -1.0)
        return None, sign[:, None, None, None] * (places_of(SETS.bev[split]) - 0.3)

    everywhere, at_home = (Transfer().measure(SETS.bench(make)) for make in (cells, turned))
    assert value(everywhere) > 0.999
    assert everywhere.also["ratio"].value == pytest.approx(1, abs=1e-3)
    assert at_home.also["in_domain"].value > 0.999
    assert value(at_home) < 0.35
    assert at_home.also["ratio"].high < 0.4


def test_retrieval_finds_planted_neighbours() -> None:
    def places(split: str) -> tuple[np.ndarray, None]:
        rng = np.random.default_rng(5)
        centres = {place: rng.normal(size=12) for place in np.unique(SETS.place[split])}
        return np.stack([centres[p] for p in SETS.place[split]]), None

    found = Retrieval().measure(SETS.bench(places, nothing))
    assert value(found) == 1.0
    assert found.also["mAP"].value == 1.0
    assert found.baseline is not None
    assert found.baseline.value < 0.25  # 9 right ones of 159


def test_retrieval_counts_no_frame_that_shares_sweeps_with_the_query() -> None:
    """All frames of a recording look alike and no other does: with frames this close together nothing is found."""
    sets = Planted()
    sets.ids = {split: tuple(f"{name.rpartition('/')[0]}/{int(name.rpartition('/')[2]) // 10}" for name in ids)
                for split, ids in sets.ids.items()}

    def recordings(split: str) -> tuple[np.ndarray, None]:
        number = np.arange(sets.counts[split]) // sets.frames
        return one_hot(number, 48), None

    assert value(Retrieval().measure(SETS.bench(recordings))) == 1.0
    assert value(Retrieval().measure(sets.bench(recordings))) < 0.2


def test_intervals_cover_the_truth() -> None:
    """Of 40 draws of a world in which a vote is right 85 times in 100, the 95 % interval holds .85 nearly always."""
    covered = 0
    for seed in range(40):
        sets = Planted(counts={"train": 200, "val": 40, "test": 200}, seed=seed)
        rng = np.random.default_rng(seed)
        shown = {}
        for split, scene in sets.scene.items():
            lost = rng.random(len(scene)) < 0.2 if split == "test" else np.zeros(len(scene), bool)
            shown[split] = np.where(lost, rng.integers(0, CLASSES, len(scene)), scene)
        found = Knn().measure(sets.bench(lambda split, shown=shown: (one_hot(shown[split], CLASSES), None))).interval
        assert found is not None
        covered += found.low <= 0.85 <= found.high
    assert covered >= 34


def test_what_cannot_be_measured_is_a_row_with_its_reason() -> None:
    view = SETS.view(cells)
    view.subject = type(view.subject)("BUNDLE", view.subject.task, why="no features: a bundle has outputs only")
    rows = climb((Linear(), Occupancy(), Retrieval(), Outputs()), Bench(view))
    for name in ("linear", "occupancy", "retrieval"):
        assert rows[name].to_json()["value"] is None
        assert rows[name].to_json()["result"] == "not measured"
        assert "outputs only" in rows[name].reason
    assert "never trained" in rows["outputs"].reason


@pytest.mark.parametrize(("broken", "reason"), [
    (lambda split: (np.full((SETS.counts[split], 3), np.nan), None), "not finite"),
    (lambda split: (None, np.zeros((SETS.counts[split], 3, 3, 3))), "does not divide"),
])
def test_broken_features_are_no_zero(broken: object, reason: str) -> None:
    assert reason in measured(Occupancy(), SETS.bench(broken)).reason


def test_one_scenario_cannot_show_transfer() -> None:
    sets = Planted()
    sets.scenario = {split: np.full(len(names), "exit") for split, names in sets.scenario.items()}
    assert "one scenario" in measured(Transfer(), sets.bench(cells)).reason


def test_ridge_is_the_textbook_solution_and_moments_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 5, generator=generator) * 3 + 1, torch.randn(300, 2, generator=generator)
    parts = Moments.of(x[:100], y[:100]) + Moments.of(x[100:], y[100:])
    fitted = fit_ridge(parts, (1e-9, 0.3))
    z = ((x - x.mean(0)) / x.std(0, unbiased=False)).double()
    for strength, linear in zip((1e-9, 0.3), fitted, strict=True):
        weights = torch.linalg.solve(z.T @ z / 300 + strength * torch.eye(5).double(),
                                     z.T @ (y - y.mean(0)).double() / 300)
        assert torch.allclose(linear(x), (z @ weights + y.mean(0)).float(), atol=1e-4)


def test_the_same_bench_gives_the_same_numbers() -> None:
    rungs = (Linear(), Knn(), Occupancy(), Transfer(), Retrieval())
    first, second = (
        {name: row.to_json() for name, row in climb(rungs, SETS.bench(classes, nothing)).items()} for _ in range(2)
    )
    assert first == second


def test_classes_are_what_the_tasks_accuracy_is_judged_by() -> None:
    task = load_task("image-classification")
    labels = np.array([3, 1, 2])
    assert class_labels(task, {"label": labels}).tolist() == labels.tolist()
    assert class_count(task) == task.io.outputs[0].shape[0]
    with pytest.raises(NotMeasuredError, match="no class label"):
        class_labels(task, {"other": labels})
    with pytest.raises(NotMeasuredError, match="no planes"):
        dense_planes(task)
