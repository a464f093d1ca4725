"""What every pre-training objective is worth: probes and few-shot tuning against a backbone with random weights.

    python benchmarks/objectives.py --data DATASET [NAME ...] [--steps N] [--seeds N] [--out DIR] [--set NAME.KEY=VALUE]

Each objective trains a teacher without labels (its own steps below, five minutes or less on two idle cores), then
`teacher probe` measures it beside the same architecture with random weights: the same samples, the same probe, paired
differences with a bootstrap over simulations. Targets: a linear probe 5 points better than random weights, few-shot IoU
better with an interval above zero, at most 300 s of training. Prints one line a number; exit 1 when a target is missed.
Accuracy holds on a busy machine; the seconds are those of this run and mean something on an idle machine alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from fmdeploy.teacher.objectives.registry import OBJECTIVES, kind_of
from fmdeploy.teacher.probe.probe import probe
from fmdeploy.teacher.train import train

RUNGS = {"linear": "scene accuracy", "segmentation": "drivable IoU", "occupancy": "occupancy IoU now",
         "forecasting": "occupancy IoU later", "few-shot-5": "IoU tuned on 5 %", "few-shot": "IoU tuned on 10 %"}
LINEAR = ("linear", "segmentation", "occupancy", "forecasting")
STEPS: dict[str, int] = {"mae": 300, "flow": 300, "worldmodel": 1200}
OTHER_STEPS = 600
RATES: dict[str, float] = {"mae": 7e-4}  # 2e-3 is the rate for supervised training
POINTS, SECONDS = 0.05, 300.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="objectives; default: all that need no labels")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="of every objective, instead of its own number")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="keep the teachers here; those that are there are not trained again")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--few-shot-steps", type=int, default=100)
    options = parser.parse_args()
    names = options.names or [name for name in OBJECTIVES if not kind_of(name).needs_labels]
    with tempfile.TemporaryDirectory() as scratch:
        home = options.out or Path(scratch)
        met = [measure(name, seed, home, options) for name in names for seed in range(options.seeds)]
    return 0 if all(met) else 1


def measure(name: str, seed: int, home: Path, options: argparse.Namespace) -> bool:
    """Train, probe and print; whether all targets are met."""
    out, steps = home / f"{name}-{seed}", options.steps or STEPS.get(name, OTHER_STEPS)
    mine = tuple(text for text in options.set if text.startswith(f"{name}."))
    teacher = train(data=options.data, out=out, objective=(name,), set=mine, steps=steps, seed=seed,
                    **({"lr": RATES[name]} if name in RATES else {}))
    timing = teacher.manifest.environment["training"]
    seconds = timing["steps"] / timing["steps_per_s"] if timing["steps_per_s"] else 0.0
    print(f"{name}, seed {seed}: {steps} steps in {seconds:.0f} s (target: at most {SECONDS:.0f})", flush=True)
    rows = probe(model=out, data=options.data, rungs=tuple(RUNGS), seed=seed,
                 few_shot_steps=options.few_shot_steps).data
    for rung, title in RUNGS.items():
        print(f"  {title:20} {_row(rows[rung])}", flush=True)
    best = max(_gain(rows[rung], "value") for rung in LINEAR)
    few = max(_gain(rows[rung], "low") for rung in ("few-shot-5", "few-shot"))
    print(f"  best linear gain {best:+.3f} (target: {POINTS:+.2f}), few-shot from {few:+.3f} (target: above 0)")
    return best >= POINTS and few > 0 and seconds <= SECONDS


def _gain(row: dict[str, Any], key: str) -> float:
    return float(row["gain"][key])


def _row(row: dict[str, Any]) -> str:
    gain = row["gain"]
    return (f"{row['value']:.4f}  random {row['baseline']['value']:.4f}  "
            f"gain {gain['value']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]")


if __name__ == "__main__":
    sys.exit(main())
