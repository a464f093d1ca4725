"""Constants of the roofline from measured latencies, judged on models that were left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from math import ceil, log

import numpy as np
from pydantic import ValidationError

from fmdeploy.errors import ConfigError
from fmdeploy.estimate.constants import Constants, Efficiency, Seen, Spread
from fmdeploy.estimate.points import Point, models
from fmdeploy.estimate.roofline import is_transformer
from fmdeploy.estimate.solver import CLOCK_MHZ, OVERHEAD_MS, USUAL, Belief, Problem, Vector, solve

COVERAGE = 0.95  # of the points by which the half-width is set; bands are claimed to hold 9 of 10
TRANSFORMER_FACTOR = 1.5  # the least by which the band of transformers is wider
PUBLISHED_FLOOR = 0.2  # boards of one kind, TensorRT versions and power supplies differ by as much
OWN_FLOOR = 0.05  # the same board, measured by its owner
MIN_POINTS, MIN_MODELS = 6, 2

Group = Callable[[Point], str]


def by_model(point: Point) -> str:
    """What is left out together."""
    return point.model


def by_family(point: Point) -> str:
    """The same, with all sizes of a network together: "resnet50-224" and "resnet18-224" are "resnet"."""
    family = point.model.partition("-")[0].partition("_")[0].rstrip("0123456789")
    return point.model[:6] if family.startswith("yolo") else family


@dataclass(frozen=True)
class Held:
    """A prediction for a point by constants that never saw its model.

    Attributes:
        error: ln(predicted / measured).
        width: half-width of the band that was given with it, ln.
    """

    point: Point
    error: float
    width: float


def fit_published(points: Sequence[Point]) -> Constants:
    """The constants that the repository ships for Orin."""
    return fit(points, source=f"{len(points)} published points of {len(models(points))} models (points.csv)",
               floor=PUBLISHED_FLOOR)


def fit(points: Sequence[Point], *, source: str, floor: float, belief: Belief = USUAL) -> Constants:
    """Fit the constants to `points`; the spread comes from leaving models out.

    Args:
        points: measured latencies.
        source: what they are, for the file.
        floor: least half-width of the band, ln.
        belief: where to start, and how firmly to hold on to it.

    Raises:
        ConfigError: there are too few points, or they fit no such device.
    """
    require_enough(points)
    problem = Problem(points, belief)
    values = [_rounded(value) for value in np.exp(solve(problem))]
    spread = spread_of(left_out_errors(points, belief=belief), [_is_transformer(point) for point in points], floor)
    sizes = [sum(row.macs for row in point.rows) * point.batch / 1e9 for point in points]
    try:
        return Constants(
            source=source, compute=Efficiency(fp32=values[0], fp16=values[1], int8=values[2]), memory=values[3],
            launch_us=values[4], launch_clock_mhz=CLOCK_MHZ if points[0].device.clock_mhz else None,
            spread=Spread(convolution=_rounded(spread[0]), transformer=_rounded(spread[1])),
            seen_gmac=Seen(low=_rounded(min(sizes)), high=_rounded(max(sizes))),
            overhead_ms=dict(zip(problem.protocols, values[5:], strict=True)))
    except ValidationError as error:
        name = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise ConfigError(f"the measurements do not fit the device: {name} would be {error.errors()[0]['input']}",
                          fix="Check the device, its power mode, the batch, and that times are milliseconds") from error


def require_enough(points: Sequence[Point]) -> None:
    """Refuse to fit where points cannot decide the constants.

    Raises:
        ConfigError: there are fewer points or models than that takes.
    """
    count = len(models(points))
    if len(points) < MIN_POINTS or count < MIN_MODELS:
        raise ConfigError("too few measurements for a fit", expected=f"at least {MIN_POINTS} of {MIN_MODELS} models",
                          found=f"{len(points)} of {count}", fix="Measure more models, batches and precisions")


def cross_validate(points: Sequence[Point], *, floor: float, group: Group = by_model) -> list[Held]:
    """Predict every group from the others, with a band from the others' own cross-validation."""
    held: list[Held] = []
    for name in _names(points, group):
        seen, out = _split(points, group, name)
        spread = spread_of(left_out_errors(seen, group), [_is_transformer(point) for point in seen], floor)
        held += [Held(point, error, spread[_is_transformer(point)])
                 for point, error in zip(out, errors_of(seen, out), strict=True)]
    return held


def left_out_errors(points: Sequence[Point], group: Group = by_model, belief: Belief = USUAL) -> list[float]:
    """ln(predicted / measured) of every point, by constants that did not see its group."""
    result = np.zeros(len(points))
    for name in _names(points, group):
        seen, out = _split(points, group, name)
        result[[group(point) == name for point in points]] = errors_of(seen, out, belief)
    return [float(value) for value in result]


def errors_of(seen: Sequence[Point], out: Sequence[Point], belief: Belief = USUAL) -> list[float]:
    """ln(predicted / measured) of `out` by constants fitted on `seen`; an unknown overhead has its usual value."""
    learnt, asked = Problem(seen, belief), Problem(out, belief)
    theta = solve(learnt)
    overhead = {name: float(value) for name, value in zip(learnt.protocols, theta[5:], strict=True)}
    own = [overhead.get(name, log(OVERHEAD_MS)) for name in asked.protocols]
    errors: Vector = asked.predicted(np.concatenate([theta[:5], own])) - asked.target
    return [float(error) for error in errors]


def spread_of(errors: Sequence[float], transformer: Sequence[bool], floor: float) -> tuple[float, float]:
    """Half-widths for convolutional and for transformer-like networks: conformal quantiles of absolute errors.

    The quantile is the ceil((n + 1) · coverage)-th smallest (arXiv:2107.07511, section 1), at most the largest. The
    band of transformers is at least 1.5 times the other one: few of them were published.
    """
    narrow = _conformal((e for e, is_one in zip(errors, transformer, strict=True) if not is_one), floor)
    wide = _conformal((e for e, is_one in zip(errors, transformer, strict=True) if is_one), floor)
    return narrow, max(wide, TRANSFORMER_FACTOR * narrow)


def _conformal(errors: Iterable[float], floor: float) -> float:
    sizes = sorted(abs(error) for error in errors)
    rank = min(ceil((len(sizes) + 1) * COVERAGE), len(sizes))
    return max(sizes[rank - 1], floor) if sizes else floor


def _names(points: Iterable[Point], group: Group) -> list[str]:
    return sorted({group(point) for point in points})


def _split(points: Sequence[Point], group: Group, name: str) -> tuple[list[Point], list[Point]]:
    out = [group(point) == name for point in points]
    return list(compress(points, [not one for one in out])), list(compress(points, out))


def _is_transformer(point: Point) -> bool:
    return is_transformer(point.rows, point.device, point.precision, point.batch)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
