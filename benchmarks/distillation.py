"""What distillation is worth: retention, several losses against logits alone, few labels against many.

    python benchmarks/distillation.py --demo DIR --out DIR [--seeds N] [--steps N] [--teacher T --features F]...
                                      [--loss NAME=WEIGHT]... [--threads N]

The first DIR is the output of `fmdeploy demo`: its dataset, teacher and features are used, and `--teacher` with
`--features` adds further teachers. For every seed (of weights, order and augmentation, and of the draw of the labelled
simulations) four students are trained for the same steps:

    several   all labels, the losses of `--loss`
    logits    the teachers' logits alone, by the task's own divergence: the strongest single loss
    few       10 % of the labels, the default losses
    half      50 % of the labels, no teacher

Differences of the primary metric are paired over test samples, pooled over seeds, with a bootstrap over simulations.
Targets: several / best teacher >= 0.97 with at most a tenth of the parameters; several - logits and few - half with
intervals above zero. The teachers saw all labels, so `few` sees them indirectly. Students already under `--out` are
not trained again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.distill.distill import distill
from fmdeploy.evaluate.bootstrap import Interval, drop
from fmdeploy.evaluate.evaluation import Evaluation, pooled
from fmdeploy.task import Metric, load_task

LOSSES = ("labels=0.5", "logits=2", "features=0.2")
RETENTION, SIZE = 0.97, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="students are kept here")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=550)
    parser.add_argument("--teacher", type=Path, action="append", default=[], help="one more teacher")
    parser.add_argument("--features", type=Path, action="append", default=[], help="its features")
    parser.add_argument("--loss", action="append", default=[])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    teachers = {"teacher": [options.demo / "teacher", *options.teacher],
                "features": [options.demo / "features", *options.features]}
    arms: dict[str, dict[str, Any]] = {
        "several": {**teachers, "labels": 1.0, "labelled_share": 1.0, "loss": options.loss or list(LOSSES)},
        "logits": {**teachers, "labels": 0.0, "loss": ["logits=2"]},
        "few": {**teachers, "labels": 0.1},
        "half": {"labels": 0.5},
    }
    found = {name: [train(options, name, seed, arm) for seed in range(options.seeds)] for name, arm in arms.items()}
    sys.exit(0 if report(found, options.demo) else 1)


def train(options: argparse.Namespace, name: str, seed: int, arm: dict[str, Any]) -> Artifact:
    """One student."""
    return distill(data=options.demo / "data", out=options.out / f"{name}-{options.steps}-{seed}", steps=options.steps,
                   seed=seed, label_seed=seed, **arm)


def report(found: dict[str, list[Artifact]], demo: Path) -> bool:
    """Print every number, and whether all targets are reached."""
    metric = load_task("bev-occupancy").metrics()[0]
    tests = {name: pooled([Evaluation.load(each, "evaluation") for each in row]) for name, row in found.items()}
    tests["best teacher"] = pooled([Evaluation.load(each, "teacher_evaluation") for each in found["several"]])
    for name, evaluation in tests.items():
        print(f"  {name:13} {metric.name} {evaluation.value(metric):.4f}")
    teacher = open_artifact(demo / "teacher").json("metrics.json")["params"]
    size = found["several"][0].json("metrics.json")["params"] / teacher
    lost = drop(tests["best teacher"], tests["several"], metric)
    kept = Interval(1 - lost.value, 1 - lost.high, 1 - lost.low, lost.n_samples, lost.n_groups)
    gains = {pair: gain(tests[pair[1]], tests[pair[0]], metric) for pair in (("several", "logits"), ("few", "half"))}
    print(f"  retention {show(kept)}   (target: >= {RETENTION}) at {size:.4f} of the parameters   (target: <= {SIZE})")
    for (ours, other), interval in gains.items():
        print(f"  {ours} - {other} {show(interval)}   (target: interval above 0)")
    return kept.value >= RETENTION and size <= SIZE and all(interval.low > 0 for interval in gains.values())


def gain(reference: Evaluation, candidate: Evaluation, metric: Metric) -> Interval:
    """How much better `candidate` is."""
    lost = drop(reference, candidate, metric, relative=False)
    return Interval(-lost.value, -lost.high, -lost.low, lost.n_samples, lost.n_groups)


def show(interval: Interval) -> str:
    """A value with its interval."""
    return f"{interval.value:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


if __name__ == "__main__":
    main()
