"""What distillation is worth: the student that saw 10 % of the labels, with and without the teacher.

    python benchmarks/label_draws.py --demo DIR [--draws N] [--steps N]

DIR is the output of `fmdeploy demo`: its dataset, teacher and features are used as they are. For every draw of the
labelled simulations the student is trained twice with the same steps, from the labels alone and with the teacher; once
more it is trained on all labels. Differences of the primary metric are paired over test samples, with a bootstrap over
simulations, and pooled over draws. Targets: the pooled interval above zero; distilled within 0.005 of all labels.
The teacher saw all labels, so the distilled student sees them indirectly: compare with the last row too.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from fmdeploy.artifact import Artifact
from fmdeploy.distill.distill import distill
from fmdeploy.evaluate.bootstrap import drop
from fmdeploy.evaluate.evaluation import Evaluation, pooled
from fmdeploy.task import Metric, load_task

LABELS = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--steps", type=int, default=550)
    options = parser.parse_args()
    metric = load_task("bev-occupancy").metrics()[0]
    with tempfile.TemporaryDirectory() as name:
        pairs = [train_pair(options.demo, Path(name), draw, options.steps) for draw in range(options.draws)]
        whole = student(options.demo, Path(name) / "whole", labels=1.0, steps=options.steps)
        report(pairs, whole, metric)


def train_pair(demo: Path, out: Path, draw: int, steps: int) -> tuple[Evaluation, Evaluation]:
    """Test evaluations of the student from labels alone and of the distilled one, for one draw of labels."""
    common: dict[str, Any] = {"labels": LABELS, "label_seed": draw, "steps": steps}
    scratch = student(demo, out / f"scratch-{draw}", **common)
    distilled = student(demo, out / f"distilled-{draw}", teacher=demo / "teacher", features=demo / "features", **common)
    return scratch, distilled


def student(demo: Path, out: Path, **options: Any) -> Evaluation:
    """Train one student and return its test evaluation."""
    artifact: Artifact = distill(data=demo / "data", out=out, **options)
    return Evaluation.load(artifact, "evaluation")


def report(pairs: list[tuple[Evaluation, Evaluation]], whole: Evaluation, metric: Metric) -> None:
    for draw, (scratch, distilled) in enumerate(pairs):
        print(f"  draw {draw}: labels only {scratch.value(metric):.4f}  distilled {distilled.value(metric):.4f}  "
              f"gain {_gain(scratch, distilled, metric)}")
    scratch, distilled = pooled([s for s, _ in pairs]), pooled([d for _, d in pairs])
    print(f"  all draws: gain {_gain(scratch, distilled, metric)}   (target: interval above 0)")
    everything = pooled([whole] * len(pairs))
    print(f"  all labels {whole.value(metric):.4f}, distilled minus that {_gain(everything, distilled, metric)}"
          "   (target: at least -0.005)")


def _gain(reference: Evaluation, candidate: Evaluation, metric: Metric) -> str:
    found = drop(reference, candidate, metric, relative=False)
    return f"{-found.value:+.4f} [{-found.high:+.4f}, {-found.low:+.4f}]"


if __name__ == "__main__":
    main()
