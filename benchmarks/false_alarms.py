"""False alarms of the guards on clean frames of the demo, as a stream: the fewer, the better.

    python benchmarks/false_alarms.py --demo DIR [--frames N]

DIR is what `fmdeploy demo` made. Every frame of the splits that neither trained nor calibrated the student goes through
the guards in order, again and again up to N frames (10,000), with the guards on streams on: frozen, repeated and torn
frames, too. Each guard has one line: alarms, frames, and the upper end of the 95 % interval of the share. A scene that
is seen a second time makes the same alarms again, so N beyond the number of frames says nothing new about scenes, but
tests the guards' memory.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from pathlib import Path

import numpy as np

from fmdeploy.data.format import open_dataset
from fmdeploy.runtime import GuardConfig, Reason, open_bundle
from fmdeploy.runtime.guards.content import Guards
from fmdeploy.task import load_task

GUARDS = (Reason.NOT_FINITE, Reason.OUT_OF_RANGE, Reason.LOW_INFORMATION, Reason.FROZEN, Reason.TORN,
          Reason.UNUSUAL_INPUT)
CHUNK = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=10_000)
    options = parser.parse_args()
    alarms, frames, farthest = stream(options.demo, options.frames)
    print(f"{frames} clean frames through the guards")
    for guard in GUARDS:
        count = alarms[guard]
        high = (count + 1.92 + 1.96 * math.sqrt(count + 0.96)) / frames if count else 3 / frames  # rule of three
        print(f"  {guard.value:16}{count:6} alarms   {100 * count / frames:7.3f} %   at most {100 * high:.3f} %")
    for name, score in sorted(farthest.items()):
        print(f"  largest {name:20}{score:6.2f} standard deviations (warning above {GuardConfig().unusual_sigma:g})")


def stream(demo: Path, wanted: int) -> tuple[Counter[Reason], int, dict[str, float]]:
    """Alarms by guard, number of frames, and the largest score of each input."""
    bundle, data, task = open_bundle(demo / "bundle"), open_dataset(demo / "data"), load_task("bev-occupancy")
    guards = Guards.of(bundle, GuardConfig())
    alarms: Counter[Reason] = Counter()
    farthest: dict[str, float] = {}
    frames = 0
    while frames < wanted:
        for split in ("val", "test"):
            samples = task.samples(data, split)
            for start in range(0, len(samples), CHUNK):
                inputs, _ = samples.batch(np.arange(start, min(start + CHUNK, len(samples))))
                for row in range(min(len(next(iter(inputs.values()))), wanted - frames)):
                    found = guards.before({name: array[row] for name, array in inputs.items()})
                    alarms.update(finding.code for finding in found.findings)
                    farthest.update({name: max(score, farthest.get(name, 0.0)) for name, score in found.scores.items()})
                    frames += 1
    return alarms, frames, farthest


if __name__ == "__main__":
    main()
