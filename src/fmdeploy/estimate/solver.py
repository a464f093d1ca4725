"""Robust least squares for the constants of the roofline.

The parameters are logarithms: three compute efficiencies, one memory efficiency, the launch cost at 1 GHz, and one
overhead for each measuring program that times more than the engine. The residuals are ln(predicted / measured), with
Huber's loss (doi:10.1214/aoms/1177703732) by re-weighting, and Levenberg-Marquardt steps. Every model counts the same,
however many of its points there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmdeploy.estimate.constants import Constants
from fmdeploy.estimate.devices import Device
from fmdeploy.estimate.points import Point
from fmdeploy.estimate.work import COMPUTE, PRECISIONS

Vector = np.ndarray[Any, np.dtype[np.float64]]

CLOCK_MHZ = 1000.0  # for which the launch cost is meant, on devices whose clock is known
OVERHEAD_MS = 1.0
HUBER = 0.15  # residuals beyond this, in ln, count linearly
STEPS, STEP, TOLERANCE = 60, 1e-5, 1e-10


@dataclass(frozen=True)
class Belief:
    """Where a fit starts and how firmly it holds on to that: what the points leave open stays there."""

    values: tuple[float, float, float, float, float]  # efficiencies (FP32, FP16, INT8, memory), launch in us at 1 GHz
    weight: float


USUAL = Belief((0.5, 0.5, 0.5, 0.7, 8.0), 0.02)


def belief_of(constants: Constants, weight: float) -> Belief:
    """Constants that were fitted before, as what to believe."""
    compute = constants.compute
    launch = constants.launch_us * (constants.launch_clock_mhz or CLOCK_MHZ) / CLOCK_MHZ
    return Belief((compute.fp32, compute.fp16, compute.int8, constants.memory, max(launch, 1e-3)), weight)


class Problem:
    """All kernels of all points in flat arrays, so that one evaluation costs microseconds."""

    def __init__(self, points: Sequence[Point], belief: Belief = USUAL) -> None:
        self.belief = belief
        self.protocols = sorted({point.protocol for point in points} - {""})
        kernels = [(point, row, row.precision(point.precision, point.device.rest))
                   for point in points for row in point.rows]
        self.starts = np.cumsum([0, *[len(point.rows) for point in points][:-1]])
        self.kind = np.array([PRECISIONS.index(kind) for _, _, kind in kernels])
        self.compute = np.array([2.0 * row.macs * point.batch / point.device.peak[kind] if row.kind in COMPUTE else 0.0
                                 for point, row, kind in kernels])
        self.memory = np.array([row.bytes_moved(point.precision, point.batch, point.device.rest)
                                / point.device.bandwidth for point, row, _ in kernels])
        self.launch = np.array([_clock_scale(point.device) * 1e-6 for point, _, _ in kernels])
        self.overhead = np.array([[point.protocol == name for name in self.protocols] for point in points], float)
        self.target = np.log([point.ms for point in points])
        count = Counter(point.model for point in points)
        self.weight = np.array([1 / count[point.model] ** 0.5 for point in points])

    @property
    def start(self) -> Vector:
        """Logarithms of the values to begin with."""
        return np.log([*self.belief.values, *[OVERHEAD_MS] * len(self.protocols)])

    def predicted(self, theta: Vector) -> Vector:
        """ln(ms) of every point."""
        values = np.exp(theta)
        body = np.maximum(self.compute / values[:3][self.kind], self.memory / values[3])
        totals = np.add.reduceat(body + self.launch * values[4], self.starts) * 1e3
        return np.asarray(np.log(totals + self.overhead @ values[5:]))


def solve(problem: Problem) -> Vector:
    """Logarithms of the parameters that fit best."""
    theta, damping = problem.start, 1e-3
    cost, residual, jacobian = _linearise(problem, theta)
    for _ in range(STEPS):
        hessian = jacobian.T @ jacobian
        step = np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), -jacobian.T @ residual)
        trial = theta + np.clip(step, -0.5, 0.5)
        found = _linearise(problem, trial)
        if found[0] >= cost:
            damping *= 4
            continue
        done = cost - found[0] < TOLERANCE
        theta, damping = trial, damping / 3
        cost, residual, jacobian = found
        if done:
            break
    return theta


def _linearise(problem: Problem, theta: Vector) -> tuple[float, Vector, Vector]:
    """Huber cost, weighted residuals and their derivatives; the belief is one more residual a parameter."""
    base = problem.predicted(theta)
    error = base - problem.target
    size = np.abs(error)
    loss = np.where(size < HUBER, error**2, HUBER * (2 * size - HUBER))
    weight = problem.weight * np.where(size < HUBER, 1.0, np.sqrt(HUBER / np.maximum(size, 1e-12)))
    columns = [(problem.predicted(theta + STEP * unit) - base) / STEP * weight for unit in np.eye(len(theta))]
    held = problem.belief.weight * (theta - problem.start)
    jacobian = np.vstack([np.stack(columns, axis=1), problem.belief.weight * np.eye(len(theta))])
    return float(problem.weight**2 @ loss + held @ held), np.concatenate([error * weight, held]), jacobian


def _clock_scale(device: Device) -> float:
    return CLOCK_MHZ / device.clock_mhz if device.clock_mhz else 1.0
