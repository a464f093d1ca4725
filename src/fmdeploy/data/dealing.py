"""Which simulation goes to which split: shares of the whole, of every scenario and of every weather in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.data.worker import Job

OFF = 1.5
"""Simulations that a weather may lack or have too many in a split; rounding alone makes it less than one."""


def deal(jobs: Sequence[Job], shares: Array) -> list[int]:
    """Number of the split of each simulation.

    They take turns, whichever split is most behind its share. But weathers take turns as well, and where the two
    keep step (four weathers, and a quarter for validation) a weather would meet one split only: then each simulation
    goes where weather, scenario and both together lack it most (minimisation; Pocock and Simon, Biometrics 31, 1975).

    Args:
        jobs: All simulations, in order.
        shares: What each split gets, float64 (S,); their sum is 1.
    """
    turns = _deal([(0,) for _ in jobs], shares)
    groups = [(0, job.scenario, job.weather, (job.scenario, job.weather)) for job in jobs]
    weathers = [group[2:] for group in groups]
    if _furthest_off(weathers, turns, shares) < OFF:
        return turns
    evenly = _deal(groups, shares)
    return evenly if set(turns) <= set(evenly) else turns  # no split may lose its only simulation to this


def _deal(groups: Sequence[Sequence[Hashable]], shares: Array) -> list[int]:
    """Each to the split that its groups, taken together, are most behind in."""
    lack: dict[Hashable, Array] = defaultdict(lambda: np.zeros(len(shares)))
    chosen: list[int] = []
    for mine in groups:
        for group in mine:
            lack[group] = lack[group] + shares
        winner = int(np.argmax(np.round(sum(lack[group] for group in mine), 9)))
        for group in mine:
            lack[group][winner] -= 1
        chosen.append(winner)
    return chosen


def _furthest_off(groups: Sequence[Sequence[Hashable]], chosen: Sequence[int], shares: Array) -> float:
    """Simulations by which any split differs from its share of any group."""
    return max(float(np.abs(np.bincount(given, minlength=len(shares)) - shares * len(given)).max())
               for given in _by_group(groups, chosen))


def _by_group(groups: Sequence[Sequence[Hashable]], chosen: Sequence[int]) -> Iterator[list[int]]:
    found: dict[Hashable, list[int]] = defaultdict(list)
    for mine, winner in zip(groups, chosen, strict=True):
        for group in mine:
            found[group].append(winner)
    yield from found.values()
