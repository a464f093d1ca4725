"""Climb: every rung on one network, each with its result or its reason."""

from __future__ import annotations

from collections.abc import Iterable

from fmdeploy.progress import progress
from fmdeploy.teacher.probe.base import Bench, NotMeasuredError, Result, Rung


def climb(rungs: Iterable[Rung], bench: Bench) -> dict[str, Result]:
    """Name → row, in order. What cannot be measured is a row of its own, never left out."""
    chosen, found = tuple(rungs), {}
    with progress("probe", total=len(chosen)) as bar:
        for rung in chosen:
            found[rung.name] = measured(rung, bench)
            bar.advance()
    return found


def measured(rung: Rung, bench: Bench) -> Result:
    """The row of one rung, or the one that says why there is no number."""
    try:
        return rung.measure(bench)
    except NotMeasuredError as error:
        return rung.refused(str(error))
