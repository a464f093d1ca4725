"""What training on the grid brings back: a depthwise student under plain max PTQ, and after QAD.

    python benchmarks/qad_recovery.py --demo DIR [--steps N] [--train-steps N] [--student DIR] [--all]

DIR is the output of `fmdeploy demo`: its dataset, teacher and features are used as they are. A depthwise student is
distilled from them and quantised by calibration alone with the largest magnitudes, every layer in INT8 ("plain": what
the outlier probe would keep in float is put back by a placement file). QAD then trains the same layers on the grid with
the same cached teacher, from the default calibrator's ranges, which are learned, too. Numbers are those of the test
split; which state stays is chosen on the validation split. `--all` adds what else wins accuracy back: the default
calibrator alone, `auto`, imitating the float student (QAT), QAD with frozen ranges, and from the largest magnitudes.
Targets: plain max PTQ loses at least 2 %, and QAD brings at least two thirds of it back.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from fmdeploy.artifact import Artifact
from fmdeploy.distill.distill import distill
from fmdeploy.evaluate.bootstrap import Interval, drop
from fmdeploy.evaluate.evaluation import Evaluation
from fmdeploy.quantize.placement import Placement
from fmdeploy.quantize.quantize import quantize
from fmdeploy.task import Metric, load_task

LR = 6e-2  # of the float student: the rate it is most accurate at
TARGET_LOSS, TARGET_SHARE = 0.02, 2 / 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150, help="of training on the grid")
    parser.add_argument("--train-steps", type=int, default=500, help="of the float student")
    parser.add_argument("--student", type=Path, help="a depthwise STUDENT made before")
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    metric = load_task("bev-occupancy").metrics()[0]
    with tempfile.TemporaryDirectory() as name:
        home, demo = Path(name), options.demo
        student = options.student or distill(
            data=demo / "data", teacher=demo / "teacher", features=demo / "features", out=home / "student",
            student="depthwise", labels=0.1, steps=options.train_steps, lr=LR).root
        common = {"student": student, "data": demo / "data"}
        made = {"probed max PTQ": _arm("probed max PTQ", home, metric, calibrator="max", **common)}
        common["placement"] = everything_in_int8(made["probed max PTQ"], home / "placement.toml")
        for arm, choice in arms(demo, options.steps, more=options.all).items():
            made[arm] = _arm(arm, home, metric, **common, **choice)
        report(made, metric)


def everything_in_int8(made: Artifact, file: Path) -> Path:
    """A placement file that puts back into INT8 what the outlier probe kept in float."""
    placement = Placement.from_json(made.json("placement.json"))
    held = [row.name for row in placement.floats if row.why.startswith("outliers")]
    file.write_text("".join(f'[[layer]]\nname = "{name}"\nprecision = "int8"\n' for name in held))
    return file


def arms(demo: Path, steps: int, *, more: bool) -> dict[str, dict[str, Any]]:
    """Name → options of `quantize`."""
    taught = {"mode": "qad", "teacher": demo / "teacher", "features": demo / "features", "steps": steps,
              "learn_scales": True}
    found: dict[str, dict[str, Any]] = {"plain max PTQ": {"calibrator": "max"}, "QAD": taught}
    if more:
        found |= {
            "plain PTQ": {},
            "plain auto PTQ": {"calibrator": "auto"},
            "QAT": {"mode": "qat", "steps": steps},
            "QAD, frozen ranges": {**taught, "learn_scales": False},
            "QAD from max ranges": {**taught, "calibrator": "max"},
        }
    return found


def _arm(name: str, home: Path, metric: Metric, **options: Any) -> Artifact:
    started = time.perf_counter()
    made: Artifact = quantize(out=home / name.replace(" ", "-"), **options)
    loss, training = _loss(made, metric), made.json("metrics.json").get("training", {})
    best = f", best at step {training['best_step']}" if training else ""
    floats = len(made.json("placement.json")["floats"])
    print(f"  {name:20} {time.perf_counter() - started:6.1f} s, {floats} in float, loses {loss.value:+.2%} "
          f"[{loss.low:+.2%}, {loss.high:+.2%}]{best}", flush=True)
    return made


def _loss(made: Artifact, metric: Metric) -> Interval:
    return drop(Evaluation.load(made, "student_evaluation"), Evaluation.load(made, "evaluation"), metric)


def report(made: dict[str, Artifact], metric: Metric) -> None:
    before = Evaluation.load(made["QAD"], "student_evaluation").value(metric)
    lost, left = (_loss(made[arm], metric).value for arm in ("plain max PTQ", "QAD"))
    print(f"float {metric.name} {before:.4f}")
    print(f"  lost by plain max PTQ  {lost:.2%}   (target: at least {TARGET_LOSS:.0%})")
    share = f"{(lost - left) / lost:.2f}" if lost > 0 else "nothing was lost"
    print(f"  brought back by QAD    {share}   (target: at least {TARGET_SHARE:.2f})")


if __name__ == "__main__":
    main()
