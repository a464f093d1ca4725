"""The demo's numbers against their targets.

    python benchmarks/demo_numbers.py --demo DIR

Reads `DIR/summary.json`, which `fmdeploy demo --out DIR` wrote; measures nothing itself.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True)
    summary: dict[str, Any] = json.loads((parser.parse_args().demo / "summary.json").read_text())
    for name, value, target, reached in rows(summary):
        print(f"{'ok ' if reached else 'NOT'} {name:44} {value:>10.4g}   target {target}")


def rows(summary: dict[str, Any]) -> Iterator[tuple[str, float, str, bool]]:
    """Name, value, target in words, reached."""
    seconds = sum(summary["seconds"].values())
    yield "seconds of all stages", seconds, "<= 420", seconds <= 420
    yield "retention (student / teacher)", summary["retention"], ">= 0.93", summary["retention"] >= 0.93
    size = summary["teacher"]["params"] / summary["student"]["params"]
    yield "teacher parameters / student parameters", size, ">= 10", size >= 10
    gain = summary["distillation_gain"]["low"]
    yield "distilled minus scratch, low end", gain, "> 0", gain > 0
    ahead = summary["student"]["iou"] - max(summary["baselines"].values())
    yield "student minus best trivial baseline", ahead, "> 0", ahead > 0
    yield "INT8 drop, relative", summary["int8_drop"], "<= 0.01", summary["int8_drop"] <= 0.01
    yield "INT8 drop in the worst slice, relative", summary["worst_slice_drop"], "<= 0.03", (
        summary["worst_slice_drop"] <= 0.03)
    latency = summary["latency"]
    yield "FP32 time / INT8 time, 1 thread", latency["speedup"], ">= 2.5", latency["speedup"] >= 2.5
    cost = latency["runtime_overhead_us"]
    yield "cost of the guards, us", cost, "<= 50", cost <= 50


if __name__ == "__main__":
    main()
