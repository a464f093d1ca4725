"""A small real bundle with the dataset it can be checked on, and budgets it keeps and budgets nothing could keep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fmdeploy.budgets import AccuracyBudget, Budgets, TargetBudget
from fmdeploy.data.format import open_dataset
from fmdeploy.draft import Draft
from fmdeploy.task import Task, load_task
from support.bundles import make_bundle, statistics
from support.report_artifacts import dataset


@dataclass(frozen=True)
class Checkable:
    """Paths of a BUNDLE, a DATASET and two budgets files."""

    bundle: Path
    data: Path
    loose: Path
    impossible: Path


def calibrate(draft: Draft, task: Task, data: Path) -> None:
    """Replace the statistics of a toy bundle, which are those of random grids: scenes would be refused as unlike them."""
    samples = task.samples(open_dataset(data), "all")
    draft.path("input_statistics.json").unlink()
    draft.write_json("input_statistics.json", statistics(samples.batch(np.arange(len(samples)))[0]))


def make_checkable(root: Path) -> Checkable:
    """Untrained toy networks at the demo task's real size: their accuracy is poor, their agreement is not."""
    data = dataset(root / "data", sequences=24)
    limits = Budgets(accuracy=AccuracyBudget(metric="iou", max_drop_vs_fp32=0.9, min_samples=20, min_groups=4, slices=()),
                     target={"cpu": TargetBudget(p50_ms=1000.0, p99_ms=5000.0, peak_mib=4000.0)}, size_mib=8.0)

    def for_the_task(draft: Draft) -> None:
        task = load_task("bev-occupancy")
        draft.write_json("io.json", task.io.model_dump(mode="json"))
        calibrate(draft, task, data.root)
        draft.write_json("model.json", {"task": "bev-occupancy"})

    bundle = make_bundle(root / "bundle", size=64, width=4, limits=limits, change=for_the_task)
    loose, impossible = root / "loose.toml", root / "impossible.toml"
    loose.write_text(limits.to_toml())
    impossible.write_text(limits.model_copy(update={"size_mib": 1e-6}).to_toml())
    return Checkable(bundle.root, data.root, loose, impossible)
