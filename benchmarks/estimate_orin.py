"""The latency model for Orin against what others published: every model predicted by constants that never saw it.

    python benchmarks/estimate_orin.py [--write]

Prints the usable points of `points.csv` with the prediction and band of leave-one-model-out, the errors, the same for
leaving out a whole family (all YOLO11 together), and the naive roofline beside it. `--write` stores the fit of all
points as `src/fmdeploy/estimate/fits/orin.toml`. Targets: median error at most 15 %, 90 % of the points within 35 %,
bands hold at least 90 %.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from math import exp
from pathlib import Path

import numpy as np

from fmdeploy.estimate.constants import Constants, Efficiency
from fmdeploy.estimate.fit import (
    PUBLISHED_FLOOR,
    Held,
    by_family,
    cross_validate,
    fit_published,
)
from fmdeploy.estimate.fusion import TENSORRT
from fmdeploy.estimate.points import Point, models, published_points, published_rows
from fmdeploy.estimate.roofline import predict
from fmdeploy.estimate.solver import Problem
from fmdeploy.estimate.tables import constants_toml

FITS = Path(__file__).resolve().parents[1] / "src" / "fmdeploy" / "estimate" / "fits"
MEDIAN, WITHIN, SHARE, COVERED = 0.15, 0.35, 0.9, 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="store the constants")
    options = parser.parse_args()
    points = published_points()
    constants = fit_published(points)
    held = cross_validate(points, floor=PUBLISHED_FLOOR)
    for one in sorted(held, key=lambda one: (one.point.model, one.point.device.name, one.point.precision)):
        print(line(one))
    print(f"{len(points)} usable of {len(published_rows())} published points, {len(models(points))} models, "
          f"{len(Problem(points).start)} parameters")
    report("leave one model out", held)
    report("leave one family out", cross_validate(points, floor=PUBLISHED_FLOOR, group=by_family))
    fused = published_points(replace(TENSORRT, after_conv=TENSORRT.after_product))
    report("leave one model out, had SiLU been fused", cross_validate(fused, floor=PUBLISHED_FLOOR))
    naive = [abs(exp(error) - 1) for error in naive_errors(points, constants)]
    print(f"naive roofline (efficiencies 1, launch 0): median error {np.median(naive):.1%}, largest {max(naive):.1%}")
    print(constants_toml(constants))
    if options.write:
        head = "# Written by benchmarks/estimate_orin.py --write\n"
        (FITS / "orin.toml").write_text(head + constants_toml(constants), encoding="utf-8")


def line(one: Held) -> str:
    point = one.point
    predicted = point.ms * exp(one.error)
    low, high = predicted * exp(-one.width), predicted * exp(one.width)
    return (f"{point.model:18} {point.device.name:16} {point.precision} b{point.batch:<3} measured {point.ms:8.3f} ms  "
            f"predicted {predicted:8.3f} ({exp(one.error) - 1:+6.1%})  band {low:7.3f} to {high:7.3f}"
            f"{'' if low <= point.ms <= high else '  OUTSIDE'}")


def report(title: str, held: Sequence[Held]) -> None:
    sizes = np.array([abs(exp(one.error) - 1) for one in held])
    inside = float(np.mean([abs(one.error) <= one.width for one in held]))
    ok = np.median(sizes) <= MEDIAN and np.mean(sizes <= WITHIN) >= SHARE and inside >= COVERED
    print(f"{'ok ' if ok else 'NOT'} {title}: median error {np.median(sizes):.1%} (<= {MEDIAN:.0%}), "
          f"{np.mean(sizes <= WITHIN):.0%} within {WITHIN:.0%} (>= {SHARE:.0%}), largest {sizes.max():.1%}, "
          f"bands hold {inside:.0%} (>= {COVERED:.0%})")


def naive_errors(points: Sequence[Point], constants: Constants) -> list[float]:
    """What the data sheet alone says."""
    ideal = constants.model_copy(
        update={"compute": Efficiency(fp32=1, fp16=1, int8=1), "memory": 1.0, "launch_us": 0.0})
    return [float(np.log(predict(point.rows, replace(point.device, constants=ideal), point.precision,
                                 point.batch).p50_ms / point.ms)) for point in points]


if __name__ == "__main__":
    main()
