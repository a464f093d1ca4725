"""Mixed precision: the cheapest set of layers to keep in FP16 so that the metric drops by at most so much.

Greedy by noise removed per microsecond, every candidate set verified by running it:

1. Rank the groups by gain: the noise that a group brings alone (leave-one-in, summed over outputs relative to their
   signal) over the microseconds that the latency model says its INT8 saves. What INT8 does not speed up is free.
2. Keep the first 1, 2, 3, 4, 6, 8, 12 … groups of that order in float until the drop is within the limit, then halve
   the last interval.
3. Give groups back to INT8, the most expensive first, wherever the drop stays within the limit without them.

The drop that decides is the point estimate on the validation split: an interval over few recordings would keep layers
in float because of what was not measured. The interval stands beside it in the artifact, and `check` judges the whole
interval on the test split, which is never looked at here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fmdeploy.progress import say
from fmdeploy.quantize.sensitivity import Effect, Judge, Sensitivity
from fmdeploy.quantize.work import LatencyModel

FORMAT = 1
MAX_RETURNS = 24  # groups that step 3 tries to give back
FREE_US = 1e-3  # a group that saves less than this is free to keep in float


@dataclass(frozen=True)
class Candidate:
    """A set of groups in float that was tried.

    Attributes:
        keep_float: Names of the groups, in the order of the network.
        int8: How many groups are quantised.
        microseconds: Predicted latency.
        effect: Measured on the validation split.
        step: What the search was doing: "all int8", "grow", "halve", "give back" or "all float".
    """

    keep_float: tuple[str, ...]
    int8: int
    microseconds: float
    effect: Effect
    step: str

    @property
    def drop(self) -> float:
        """Relative drop of the metric; infinite where it is undefined."""
        return float("inf") if self.effect.drop is None else self.effect.drop


@dataclass(frozen=True)
class Search:
    """What was searched and found, `search.json`.

    Attributes:
        max_drop: Largest relative drop that was allowed.
        metric: Whose drop.
        samples: How many samples of the validation split.
        device: For which latency was predicted, with its power mode.
        reached: Whether `chosen` is within the limit with at least one group in INT8.
        chosen: What to build.
        tried: All candidates, in the order they were tried.
        gains: Group → microseconds that its INT8 saves.
    """

    max_drop: float
    metric: str
    samples: int
    device: str
    reached: bool
    chosen: Candidate
    tried: tuple[Candidate, ...]
    gains: dict[str, float]

    def front(self) -> list[Candidate]:
        """Candidates that no other one beats in both latency and drop, the fastest first."""
        front: list[Candidate] = []
        for candidate in sorted(self.tried, key=lambda c: (c.microseconds, c.drop)):
            if not front or candidate.drop < front[-1].drop:
                front.append(candidate)
        return front

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        front = self.front()
        return {"format": FORMAT, **asdict(self), "front": [k for k, tried in enumerate(self.tried) if tried in front]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Search:
        """Read back what `to_json` gave."""
        rest = {name: values[name] for name in ("max_drop", "metric", "samples", "device", "reached", "gains")}
        return cls(**rest, chosen=_candidate(values["chosen"]), tried=tuple(_candidate(c) for c in values["tried"]))


def _candidate(values: Mapping[str, Any]) -> Candidate:
    return Candidate(tuple(values["keep_float"]), values["int8"], values["microseconds"], Effect(**values["effect"]),
                     values["step"])


def search(judge: Judge, sensitivity: Sensitivity, latency: LatencyModel, max_drop: float) -> Search:
    """Find the cheapest groups to keep in float.

    Args:
        judge: Runs candidates on the validation split.
        sensitivity: Of the same module.
        latency: Of the same module.
        max_drop: Largest relative drop of the primary metric.
    """
    tries = _Tries(judge, latency)
    order = ranking(sensitivity, latency)
    best = tries.run((), "all int8")
    if best.drop > max_drop:
        best = _give_back(tries, _grow(tries, order, max_drop), max_drop)
    whole = tries.run(judge.board.names, "all float")
    within = [c for c in tries.found.values() if c.drop <= max_drop and c.int8]
    reached = bool(within)
    if reached:
        best = min(within, key=lambda c: (c.microseconds, len(c.keep_float)))
    else:  # best effort: the smallest loss that still has a layer in INT8
        best = min((c for c in tries.found.values() if c.int8), key=lambda c: (c.drop, c.microseconds), default=whole)
    gains = {name: latency.gain(name) for name in judge.board.names}
    device = f"{latency.device.name} ({latency.device.mode})"
    return Search(max_drop, sensitivity.metric, len(judge.samples), device, reached, best,
                  tuple(tries.found.values()), gains)


def ranking(sensitivity: Sensitivity, latency: LatencyModel) -> list[str]:
    """Groups, the one first that removes the most noise for each microsecond it costs to keep in float."""
    worth = {row.name: _noise(row.alone) / max(latency.gain(row.name), FREE_US) for row in sensitivity.rows}
    return sorted(worth, key=lambda name: -worth[name])


def _noise(effect: Effect) -> float:
    """Noise power over signal power, summed over the outputs."""
    return float(sum(10 ** (-ratio / 10) for ratio in effect.sqnr_db.values()))


class _Tries:
    """Runs candidates, each once."""

    def __init__(self, judge: Judge, latency: LatencyModel) -> None:
        self.judge, self.latency = judge, latency
        self.found: dict[tuple[str, ...], Candidate] = {}

    def run(self, keep_float: Collection[str], step: str) -> Candidate:
        """Measure the network with the groups `keep_float` in float."""
        names = self.judge.board.names
        key = tuple(name for name in names if name in keep_float)
        if key not in self.found:
            on = self.judge.board.quantised([name for name in names if name not in keep_float])
            effect = self.judge.effect(on)
            self.found[key] = Candidate(key, len(on), self.latency.microseconds(on), effect, step)
            drop = "undefined" if effect.drop is None else f"{effect.drop:.4f}"
            say(f"{step}: {len(key)} of {len(names)} groups in float, drop {drop}, "
                f"{self.found[key].microseconds:.0f} us predicted")
        return self.found[key]


def _sizes(count: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, 16 … up to `count`: a step is never more than half of what is kept already."""
    size = 1
    while size < count:
        yield size
        size += 1 << max(0, size.bit_length() - 2)
    yield count


def _grow(tries: _Tries, order: list[str], max_drop: float) -> Candidate:
    """The shortest prefix of `order` within the limit, as far as halving finds it; the whole of it where none is."""
    failed, passed = 0, tries.run((), "all int8")
    size = 0
    for size in _sizes(len(order)):
        passed = tries.run(order[:size], "grow")
        if passed.drop <= max_drop:
            break
        failed = size
    while size - failed > 1 and passed.drop <= max_drop:
        middle = (failed + size) // 2
        candidate = tries.run(order[:middle], "halve")
        if candidate.drop <= max_drop:
            size, passed = middle, candidate
        else:
            failed = middle
    return passed


def _give_back(tries: _Tries, start: Candidate, max_drop: float) -> Candidate:
    """Quantise again what is not needed in float, the most expensive group first."""
    best = start
    if best.drop > max_drop:
        return best
    for name in sorted(start.keep_float, key=lambda n: -tries.latency.gain(n))[:MAX_RETURNS]:
        candidate = tries.run([n for n in best.keep_float if n != name], "give back")
        if candidate.drop <= max_drop:
            best = candidate
    return best
