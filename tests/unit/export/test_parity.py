"""Parity gates and golden vectors' samples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fmdeploy.errors import GateError
from fmdeploy.export.parity import Outputs, Parity, compare, outputs_of, require_parity
from fmdeploy.subset import subset
from fmdeploy.task import Array, Arrays, load_task

TASK = load_task("image-classification")
FINE = Parity("qdq", "torch fake-quant", {"logits": 45.0}, "accuracy", 0.905, 0.91, 1000)


class _Samples:
    """Ten images whose label is the number of the sample."""

    ids = tuple(f"s/{i}" for i in range(10))
    groups = np.arange(10)
    slices = {"half": np.array(["a", "b"] * 5)}  # noqa: RUF012 - a test double

    def __len__(self) -> int:
        return 10

    def batch(self, index: Array) -> tuple[Arrays, Arrays]:
        return {"image": np.zeros((len(index), 1), np.float32)}, {"label": np.asarray(index)}


def _always_three(inputs: Arrays) -> Arrays:
    return {"logits": np.tile(np.eye(10, dtype=np.float32)[3], (len(inputs["image"]), 1))}


def test_a_fine_comparison_passes() -> None:
    require_parity(FINE)


@pytest.mark.parametrize("ratio", [39.9, float("-inf"), float("nan")])
def test_too_much_noise_fails(ratio: float) -> None:
    with pytest.raises(GateError, match=r"differs from torch fake-quant in output 'logits' \(expected >= 40 dB") as caught:
        require_parity(replace(FINE, sqnr_db={"other": 50.0, "logits": ratio}))
    assert caught.value.exit_code == 1


def test_a_moved_metric_fails_and_few_samples_are_forgiven_two() -> None:
    with pytest.raises(GateError, match="differs from torch fake-quant in accuracy"):
        require_parity(replace(FINE, value=0.89))
    require_parity(replace(FINE, value=0.75, num_samples=10))


def test_modules_alone_have_a_lower_floor() -> None:
    require_parity(replace(FINE, sqnr_db={"logits": 36.0}, by_modules=True))
    assert replace(FINE, by_modules=True).floor_db == 35
    assert replace(FINE, variant="fp32", by_modules=True).floor_db == 60


def test_a_metric_that_became_undefined_fails() -> None:
    nan = float("nan")
    for value, reference in ((nan, 0.9), (0.9, nan), (float("inf"), 0.9)):
        with pytest.raises(GateError, match="in accuracy"):
            require_parity(replace(FINE, value=value, reference_value=reference))
    require_parity(replace(FINE, value=nan, reference_value=nan))


def test_comparison_is_in_the_units_of_the_field() -> None:
    reference = Outputs({"logits": np.array([[3.0, 4.0]])}, 0.5)
    found = Outputs({"logits": np.array([[3.3, 4.4]])}, 0.4)
    parity = compare("fp32", found, "torch", reference, TASK)
    assert parity.sqnr_db == {"logits": pytest.approx(20)}
    assert parity.to_json() == {
        "against": "torch", "sqnr_db": {"logits": pytest.approx(20)}, "cosine": {"logits": pytest.approx(1)}, "floor_db": 60.0,
        "accuracy": 0.4, "accuracy_of_reference": 0.5, "samples": 1,
    }
    assert "20.0 dB; accuracy 0.4000, reference 0.5000" in str(parity)


def test_subset_is_evenly_spaced_and_keeps_ids_groups_slices_targets() -> None:
    some = subset(_Samples(), 4)
    assert some.ids == ("s/0", "s/3", "s/6", "s/9")
    assert some.groups.tolist() == [0, 3, 6, 9]
    assert some.slices["half"].tolist() == ["a", "b", "a", "b"]
    assert some.batch(np.array([1, 3]))[1]["label"].tolist() == [3, 9]
    assert len(subset(_Samples(), 100)) == 10


def test_outputs_are_kept_in_order_with_the_metric() -> None:
    found = outputs_of(_always_three, subset(_Samples(), 4), TASK)
    assert found.arrays["logits"].shape == (4, 10)
    assert found.value == 0.25
