"""Recording speed: frames a second of `data record` against real time, and against highway-env's own stepping.

Both ratios come from one process and are interleaved, with an A/A control (the same side timed against itself).

    python benchmarks/record.py [--runs 30]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from fmdeploy.data.highway import SCENARIOS, open_road
from fmdeploy.data.traffic import Traffic
from fmdeploy.data.weather import WEATHERS
from fmdeploy.data.worker import Job, record_sequences
from fmdeploy.data.workers import usable_cores

STEPS = 20


def stock(run: int) -> None:
    with open_road(SCENARIOS[run % len(SCENARIOS)], run) as (road, _):
        for _ in range(STEPS):
            road.act()
            road.step(0.1)


def table(run: int) -> None:
    with open_road(SCENARIOS[run % len(SCENARIOS)], run) as (road, _):
        traffic = Traffic(road)
        for _ in range(STEPS):
            traffic.step(0.1)


def seconds(function: Callable[[int], None], run: int) -> float:
    started = time.perf_counter()
    function(run)
    return time.perf_counter() - started


def ratios(one: Callable[[int], None], other: Callable[[int], None], runs: int) -> list[float]:
    """Seconds of `one` over seconds of `other`, run by run, in alternating order."""
    found = []
    for run in range(runs):
        first, second = (one, other) if run % 2 else (other, one)
        times = {first: seconds(first, run)}
        times[second] = seconds(second, run)
        found.append(times[one] / times[other])
    return found


def again(run: int) -> None:
    stock(run)


def frames_a_second(runs: int) -> list[float]:
    """One core: simulation, both sensors and labels, each scenario in turn."""
    rates = []
    for run in range(runs):
        job = Job(run, SCENARIOS[run % len(SCENARIOS)], 50_000 + run, WEATHERS[run % len(WEATHERS)], 40, 2)
        started = time.perf_counter()
        sequences = record_sequences(job)
        rates.append(40 * len(sequences) / (time.perf_counter() - started))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=32)
    runs = parser.parse_args().runs
    for scenario in range(len(SCENARIOS)):
        stock(scenario)
    control, gain, rates = ratios(stock, again, runs), ratios(stock, table, runs), frames_a_second(runs)
    harmonic = statistics.harmonic_mean(rates)
    print(f"A/A control                     {np.median(control):6.2f} x  (median of {runs})")
    print(f"highway-env / table stepping    {np.median(gain):6.2f} x  (10..90 %: {np.percentile(gain, 10):.2f}.."
          f"{np.percentile(gain, 90):.2f})")
    print(f"recorded frames / real time     {harmonic / 10:6.1f} x  a core "
          f"(2 egos at 5 frames/s; {harmonic:.0f} frames/s a core, {usable_cores()} cores here)")


if __name__ == "__main__":
    main()
