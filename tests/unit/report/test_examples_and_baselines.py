"""Example outputs are the same samples for every stage; baselines are judged like models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmdeploy.errors import DataError
from fmdeploy.evaluate.baselines import evaluate_baselines
from fmdeploy.evaluate.examples import choose, load_examples, save_examples
from fmdeploy.evaluate.metrics import Accuracy
from fmdeploy.manifest import Kind
from fmdeploy.task import Array, Arrays
from support.report_artifacts import make


@dataclass
class Points:
    """Forty labelled points in four groups and two slicings."""

    n: int = 40

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(f"g{k % 4}/{k}" for k in range(self.n))

    @property
    def groups(self) -> Array:
        return np.arange(self.n) % 4

    @property
    def slices(self) -> dict[str, Array]:
        return {"kind": np.array([f"k{k % 5}" for k in range(self.n)]), "rare": np.arange(self.n) == 17}

    def __len__(self) -> int:
        return self.n

    def batch(self, index: Array) -> tuple[Arrays, Arrays]:
        return {"x": np.eye(3, dtype=np.float32)[index % 3]}, {"scene": index % 3}


def test_choice_is_stable_and_covers_slices_and_groups() -> None:
    samples = Points()
    chosen = choose(samples, 6)
    assert np.array_equal(chosen, choose(samples, 6))
    assert len(set(chosen.tolist())) == 6
    assert 17 in chosen, "the one rare sample"
    assert {f"k{k}" for k in range(5)} == set(samples.slices["kind"][chosen])
    assert len(set(samples.groups[chosen])) == 4
    assert len(choose(Points(2), 6)) == 2


def test_examples_survive_the_disk(tmp_path: Path) -> None:
    artifact = make(tmp_path / "a", Kind.STUDENT, {},
                    lambda draft: save_examples(draft, lambda inputs: {"scene": inputs["x"]}, Points(), count=3))
    found = load_examples(artifact)
    assert len(found) == 3
    for name, outputs in found.items():
        assert np.array_equal(outputs["scene"], np.eye(3)[int(name.split("/")[1]) % 3])


def test_foreign_keys_are_refused(tmp_path: Path) -> None:
    artifact = make(tmp_path / "a", Kind.STUDENT, {},
                    lambda draft: draft.write_tensors("examples.safetensors", {"bad": np.zeros(2, np.float32)}))
    with pytest.raises(DataError, match="not '<sample>"):
        load_examples(artifact)


class Guessing:
    """As much of a task as baselines need."""

    def metrics(self) -> tuple[Any, ...]:
        return (Accuracy(),)

    def baselines(self) -> dict[str, Callable[[Arrays], Arrays]]:
        return {"copy": lambda i: {"scene": i["x"]}, "always 0": lambda i: {"scene": np.eye(3)[[0] * len(i["x"])]}}


def test_baselines_are_judged_like_models() -> None:
    task: Any = Guessing()
    found = evaluate_baselines(task, Points(), data="d:test")
    assert found["copy"].value(Accuracy()) == 1.0
    assert found["always 0"].value(Accuracy()) == pytest.approx(14 / 40)
    assert found["copy"].data == "d:test"


def test_a_task_without_baselines_has_none() -> None:
    from fmdeploy.task import load_task

    task: Any = load_task("image-classification")
    assert evaluate_baselines(task, Points()) == {}
