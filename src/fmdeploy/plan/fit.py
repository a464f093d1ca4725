"""Fit a scaling law to runs, with intervals.

Robust least squares in log L (Huber, arXiv:2203.15556, equation 10) from the best points of a grid, since the
surface has many valleys. Intervals come from refitting resampled runs; the published ones were far too narrow because
the optimiser had stopped early (arXiv:2404.10102), so every fit here runs to convergence.

Legend: R runs, K parameters of the law, D draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.errors import DataError
from fmdeploy.optional import require
from fmdeploy.plan.laws import Law
from fmdeploy.plan.runs import Runs

HUBER = 1e-3
BEST_STARTS = 24
CLEAR = 2.0  # times the runs' scatter: a fall of the loss that is less says nothing about the exponent behind it
MIN_KEPT = 0.8  # share of the draws that must converge for an interval to mean anything


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
        law: Which.
        theta: float64 (K,), see `Law`.
        draws: float64 (D, K), the same from resampled runs; empty where there are none.
        rms: Root mean square error of log L.
        num_runs: R.
    """

    law: Law
    theta: Array
    draws: Array
    rms: float
    num_runs: int

    def to_json(self, confidence: float) -> dict[str, Any]:
        """Each number of the law as {value, low, high}."""
        values = self.law.values(self.theta)
        drawn = [self.law.values(theta) for theta in self.draws]
        return {name: interval(value, [each[name] for each in drawn], confidence) for name, value in values.items()}

    def optimum(self, flops: float, confidence: float) -> dict[str, Any]:
        """The compute-optimal pair for `flops`, and the loss it should reach."""
        params, tokens = self.law.optimum(self.theta, flops)
        pairs = [self.law.optimum(theta, flops) for theta in self.draws]
        return {
            "flops": flops, "params": interval(params, [pair[0] for pair in pairs], confidence),
            "tokens": interval(tokens, [pair[1] for pair in pairs], confidence),
            "loss": self.law.loss(self.theta, params, tokens),
        }


def interval(value: float, drawn: list[float], confidence: float) -> dict[str, float | None]:
    """{value, low, high}: percentiles of the draws, null where they are too few or not finite."""
    finite = np.array([each for each in drawn if math.isfinite(each)])
    if not len(drawn) or len(finite) < MIN_KEPT * len(drawn):
        return {"value": value, "low": None, "high": None}
    tail = (1 - confidence) / 2
    low, high = np.quantile(finite, [tail, 1 - tail])
    return {"value": value, "low": float(low), "high": float(high)}


def fit_law(law: Law, runs: Runs, *, draws: int = 200, seed: int = 0) -> Fit:
    """Fit `law` to `runs`.

    Args:
        law: Which.
        runs: The user's own.
        draws: Refits of resampled runs, for the intervals; 0 for none.
        seed: Of the resampling.

    Raises:
        DataError: no start of the grid converges, or the loss does not fall with parameters or tokens: any law's
            exponents are above 0, so that a fit would print numbers, and a best size, that mean nothing.
    """
    started = sorted(law.starts(), key=lambda theta: _cost(law, theta, runs))[:BEST_STARTS]
    found = [result for theta in started if (result := _descend(law, theta, runs)) is not None]
    if not found:
        raise DataError("the law cannot be fitted to these runs", where="fit", found=f"{len(runs)} runs")
    theta, _ = min(found, key=lambda result: result[1])
    rms = float(np.sqrt(np.mean(np.square(_residuals(theta, law, runs)))))
    _refuse_no_fall(law, theta, runs, rms)
    rng = np.random.default_rng(seed)
    again = [_refit(law, theta, runs, rng) for _ in range(draws)]
    kept = [each for each in again if each is not None]
    if len(kept) < MIN_KEPT * draws:
        kept = []
    return Fit(law, theta, np.array(kept).reshape(-1, len(theta)), rms, len(runs))


def _refuse_no_fall(law: Law, theta: Array, runs: Runs, rms: float) -> None:
    """The fitted loss must fall from the least to the most of each, where the other is largest and hides least."""
    most = (runs.params.max(), runs.tokens.max())
    for column, (name, values) in enumerate((("params", runs.params), ("tokens", runs.tokens))):
        least = np.array(most)
        least[column] = values.min()
        ends = law.log_loss(theta, *np.stack([least, most], axis=1))
        if not ends[0] - ends[1] > CLEAR * rms:
            raise DataError(f"the loss does not fall with {name}: no law and no best size can be told from these runs",
                            where="fit", expected=f"a loss that falls with {name} by more than the runs scatter",
                            found=_trend(runs, column), fix="Look for runs that did not converge, or add larger ones")


def _trend(runs: Runs, column: int) -> str:
    """What a straight line through the logarithms says of each doubling, the other held equal."""
    rows_R3 = np.stack([np.log2(runs.params), np.log2(runs.tokens), np.ones(len(runs))], axis=1)
    slope = np.linalg.lstsq(rows_R3, np.log(runs.loss), rcond=None)[0][column]
    return f"{np.expm1(slope):+.2%} for each doubling"


def _refit(law: Law, theta: Array, runs: Runs, rng: np.random.Generator) -> Array | None:
    drawn = runs.take(rng.integers(0, len(runs), len(runs)))
    result = _descend(law, theta, drawn)
    return None if result is None else result[0]


def _descend(law: Law, theta: Array, runs: Runs) -> tuple[Array, float] | None:
    """The nearest valley and its depth; None where the descent fails or leaves what is possible."""
    try:
        found = require("scipy.optimize").least_squares(
            _residuals, theta, args=(law, runs), loss="huber", f_scale=HUBER, x_scale="jac", max_nfev=2000,
            xtol=1e-12, ftol=1e-12, gtol=1e-12,
        )
    except ValueError:  # a residual that is not finite
        return None
    exponents = found.x[-2:]
    return (found.x, float(found.cost)) if np.isfinite(found.x).all() and (exponents > 0).all() else None


def _residuals(theta: Array, law: Law, runs: Runs) -> Array:
    return np.asarray(law.log_loss(theta, runs.params, runs.tokens) - np.log(runs.loss))


def _cost(law: Law, theta: Array, runs: Runs) -> float:
    return float(np.abs(_residuals(theta, law, runs)).sum())
