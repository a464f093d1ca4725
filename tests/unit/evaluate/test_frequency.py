from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from fmdeploy.evaluate.evaluation import evaluate
from fmdeploy.evaluate.frequency import calibration_guard, frequencies
from fmdeploy.evaluate.metrics import ECE, Accuracy, Arrays, TopLabelECE


class Coins:
    """240 frames of 24 drives; each of 100 cells is occupied with a probability of its own, which is the input."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.chance = rng.uniform(0.02, 0.3, (240, 2, 10, 10)).astype(np.float32)
        self.bev = (rng.random(self.chance.shape) < self.chance).astype(np.uint8)
        self.ids, self.groups = tuple(map(str, range(240))), np.repeat(np.arange(24), 10)
        self.slices: dict[str, npt.NDArray[np.generic]] = {}

    def __len__(self) -> int:
        return 240

    def batch(self, index: npt.NDArray[np.generic]) -> tuple[Arrays, Arrays]:
        return {"chance": self.chance[index]}, {"bev": self.bev[index]}


def guard_of(factor: float) -> dict[str, object]:
    def predict(inputs: Arrays) -> Arrays:
        chance = np.clip(np.asarray(inputs["chance"], np.float64) * factor, 1e-6, 1 - 1e-6)
        return {"bev": np.log(chance / (1 - chance)).astype(np.float32)}

    events, errors = frequencies("bev", "bev", ("now", "later")), (ECE(channels=(0, 1)),)
    return calibration_guard(evaluate(predict, Coins(), (*errors, *events)), errors, events)


def test_the_true_probabilities_pass() -> None:
    found = guard_of(1.0)
    assert found["guard"] == "pass"
    for event in ("now", "later"):
        seen = found["events"][event]  # type: ignore[index]
        assert seen["low"] < 1.0 < seen["high"]
        assert seen["observed"] == pytest.approx(0.16, abs=0.01)
        assert seen["predicted"] == pytest.approx(seen["value"] * seen["observed"])
    assert found["errors"]["ece"]["value"] < 0.01  # type: ignore[index]


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_expecting_too_much_or_too_little_fails(factor: float) -> None:
    found = guard_of(factor)
    assert found["guard"] == "fail"
    assert found["events"]["now"]["value"] == pytest.approx(factor, rel=0.05)  # type: ignore[index]


def test_an_event_that_never_happens_is_not_measured() -> None:
    events = frequencies("logits", "label", ("a", "b"))
    outputs: Arrays = {"logits": np.array([[2.0, 0.0]] * 12, np.float32)}
    total = events[1].statistics(outputs, {"label": np.zeros(12, np.int64)}).sum(axis=0)
    assert math.isnan(events[1].value(total))


def test_unknown_classes_are_no_chance_to_be_right_or_wrong() -> None:
    outputs: Arrays = {"scene": np.array([[3.0, 0.0], [0.0, 3.0], [9.0, 0.0]], np.float32)}
    targets: Arrays = {"scene": np.array([0, 0, -1])}
    assert Accuracy().value(Accuracy().statistics(outputs, targets).sum(axis=0)) == 0.5
    assert TopLabelECE().statistics(outputs, targets)[:, :15].sum() == 2
    event = frequencies("scene", "scene", ("a", "b"))[0]
    assert event.statistics(outputs, targets)[:, 2].tolist() == [1.0, 1.0, 0.0]
