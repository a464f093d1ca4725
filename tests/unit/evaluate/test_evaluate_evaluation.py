"""Evaluations: batches do not matter, slices are masks, files round-trip, budgets are strict."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fmdeploy.budgets import AccuracyBudget, Budgets, TargetBudget, read_budgets
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import ConfigError, DataError
from fmdeploy.evaluate.evaluation import Evaluation, evaluate
from fmdeploy.evaluate.metrics import Accuracy, OccupancyIoU
from fmdeploy.manifest import Kind
from support.bundles import BundleConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass
class Scenes:
    """Thirty random scenes."""

    count: int = 30
    slices: Arrays = field(default_factory=lambda: {"weather": np.array(["fog", "clear", "rain"] * 10),
                                                    "rare": np.arange(30) < 3})

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(f"s{i}" for i in range(self.count))

    @property
    def groups(self) -> np.ndarray[Any, Any]:
        return np.arange(self.count) // 3

    def __len__(self) -> int:
        return self.count

    def batch(self, index: np.ndarray[Any, Any]) -> tuple[Arrays, Arrays]:
        rng = np.random.default_rng(0)
        bev = rng.normal(size=(30, 5, 4, 4)).astype(np.float32)[index]
        scene = np.asarray(rng.integers(0, 3, size=30))[index]
        return {"x": bev}, {"bev": (bev + 0.5 > 0).astype(np.uint8), "scene": scene}


def _predict(inputs: Arrays) -> Arrays:
    return {"bev": inputs["x"], "scene": inputs["x"][:, 0, 0, :3]}


METRICS = (OccupancyIoU(), Accuracy())


def _evaluate(batch_size: int = 7) -> Evaluation:
    return evaluate(_predict, Scenes(), METRICS, batch_size=batch_size, data="d:test")


def test_batch_size_does_not_matter() -> None:
    one, many = _evaluate(1), _evaluate(30)
    assert one.value(METRICS[0]) == many.value(METRICS[0])
    assert np.array_equal(one.stats["iou"], many.stats["iou"])


def test_slices_partition_the_samples() -> None:
    found = _evaluate()
    masks = found.masks()
    assert list(masks) == ["weather=clear", "weather=fog", "weather=rain", "rare"]
    total = sum(found.total(METRICS[0], masks[f"weather={name}"]) for name in ("clear", "fog", "rain"))
    assert np.array_equal(total, found.total(METRICS[0]))
    assert set(found.slice_values(METRICS[0])) == set(masks)
    with pytest.raises(DataError, match="no slice axis 'place'"):
        found.masks(("place",))


def test_save_and_load(tmp_path: Path) -> None:
    found = _evaluate()
    artifact = produce(tmp_path / "c", Kind.CHECK, stage="check", config=BundleConfig(), inputs={},
                       build=lambda draft: found.save(draft, "evaluation.fp32"))
    back = Evaluation.load(artifact, "evaluation.fp32")
    assert back.ids == found.ids
    assert back.data == "d:test"
    assert all(np.array_equal(back.stats[name], found.stats[name]) for name in found.stats)
    assert all(np.array_equal(back.masks()[name], mask) for name, mask in found.masks().items())


def test_load_refuses_files_of_different_length(tmp_path: Path) -> None:
    found = _evaluate()

    def build(draft: Draft) -> None:
        found.save(draft, "e")
        draft.write_tensors("e.safetensors", {"groups": found.groups[:-1], "stats.iou": found.stats["iou"]})

    artifact = produce(tmp_path / "c", Kind.CHECK, stage="check", config=BundleConfig(), inputs={}, build=build)
    with pytest.raises(DataError, match="groups has the wrong length"):
        Evaluation.load(artifact, "e")


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(DataError, match="nothing to evaluate"):
        evaluate(_predict, Scenes(count=0), METRICS)


def test_output_of_the_wrong_batch_size_is_an_error() -> None:
    with pytest.raises(DataError, match="wrong batch size"):
        evaluate(lambda inputs: {"bev": inputs["x"][:1], "scene": inputs["x"]}, Scenes(), METRICS)


def test_unknown_metric_is_an_error() -> None:
    with pytest.raises(DataError, match="was not evaluated"):
        _evaluate().value(Accuracy("other"))


BUDGETS = Budgets(
    accuracy=AccuracyBudget(metric="iou", max_drop_vs_fp32=0.01, required_slices=("rare",)), size_mib=4.0,
    target={"cpu": TargetBudget(p50_ms=10.0), "orin-nano": TargetBudget(machine="aarch64", p99_ms=40.0)},
)


def test_budgets_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "budgets.toml"
    path.write_text(BUDGETS.to_toml())
    assert read_budgets(path) == BUDGETS


NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
LIMITS = st.none() | st.floats(0, 0.99, exclude_min=True)


@settings(max_examples=60, deadline=None)
@given(metric=NAMES, slices=st.lists(NAMES, max_size=3), target=NAMES, machine=st.none() | NAMES, limit=LIMITS)
@example(metric='i"o\\u', slices=["it's", "a\nb", "\x7f"], target='x"]\n[y', machine="\U0001f697", limit=1e-9)
def test_any_budgets_survive_toml(
    metric: str, slices: list[str], target: str, machine: str | None, limit: float | None
) -> None:
    """Quotes, backslashes, line ends and control characters in names."""
    accuracy = AccuracyBudget(metric=metric, slices=tuple(slices), required_slices=tuple(slices), max_slice_drop=limit)
    budgets = Budgets(accuracy=accuracy, target={target: TargetBudget(machine=machine, p50_ms=limit)}, size_mib=limit)
    assert Budgets.model_validate(tomllib.loads(budgets.to_toml())) == budgets


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[accuracy]\nmetric = "iou"\nmax_drop_vs_techer = 0.1', "max_drop_vs_techer"),
        ('[accuracy]\nmetric = "iou"\nmax_drop_vs_fp32 = -0.1', "max_drop_vs_fp32"),
        ('[accuracy]\nmetric = "iou"\nmax_drop_vs_fp32 = nan', "max_drop_vs_fp32"),
        ('[accuracy]\nmetric = "iou"\n[target.cpu]\np50_ms = "10"', "p50_ms"),
        ('[accuracy]\nmetric = "iou"\n[latency]\np50_ms = 1', "unknown key 'latency'"),
        ("size_mib = 3.0", "'accuracy' is required"),
        ("size_mib = ", "is not TOML"),
    ],
)
def test_bad_budgets_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "budgets.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_budgets(path)


def test_target_must_be_clear() -> None:
    assert BUDGETS.for_target("cpu")[1].p50_ms == 10.0
    with pytest.raises(ConfigError, match="cpu or orin-nano"):
        BUDGETS.for_target(None)
    with pytest.raises(ConfigError, match="cpu or orin-nano"):
        BUDGETS.for_target("orin")
    only = Budgets(accuracy=AccuracyBudget(metric="iou"))
    assert only.for_target(None) == ("cpu", TargetBudget())
