"""The transitions, as a table: the first row whose state and event fit and whose condition holds is taken.

The ladder (`ladder.py`) has judged the event before, so the conditions speak about the causes that hold now.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from fmdeploy.runtime.state.kinds import Command, EventKind, State


class Row(NamedTuple):
    """One transition; `condition` is the name of a function in `conditions.py`."""

    state: State
    event: EventKind
    condition: str
    then: State
    commands: tuple[Command, ...] = ()


S, E, C = State, EventKind, Command

# Evidence that raises a cause while frames are served: at once, or when the ladder finds it too often.
AT_ONCE = (
    E.FRAME_OVERDUE, E.NO_INPUT, E.SELF_TEST_FAILED, E.MONITOR_LOST, E.MEMORY_LOW, E.THROTTLED, E.SENSOR_LOST,
    E.TIER_CHANGED,
)
TOO_OFTEN = (E.FRAME_LATE, E.FRAME_BAD, E.BACKEND_FAILED)


def _rows() -> Iterable[Row]:
    yield Row(S.UNCONFIGURED, E.VERIFIED, "always", S.LOADING, (C.LOAD,))
    yield Row(S.LOADING, E.LOADED, "always", S.SELF_TEST, (C.RUN_SELF_TEST,))
    yield Row(S.LOADING, E.WORKER_STARTED, "always", S.SELF_TEST, (C.RUN_SELF_TEST,))
    yield Row(S.SELF_TEST, E.SELF_TEST_PASSED, "degraded", S.DEGRADED, (C.PREPARE_STANDBY,))
    yield Row(S.SELF_TEST, E.SELF_TEST_PASSED, "otherwise", S.READY, (C.PREPARE_STANDBY,))
    yield Row(S.SELF_TEST, E.SELF_TEST_FAILED, "always", S.SAFE_OUTPUT, (C.STOP_WORKER,))

    yield Row(S.READY, E.FRAME_GOOD, "always", S.ACTIVE)
    for state in (S.READY, S.ACTIVE):
        for event in AT_ONCE:
            yield Row(state, event, "always", S.DEGRADED)
        for event in TOO_OFTEN:
            yield Row(state, event, "degraded", S.DEGRADED)
    yield Row(S.DEGRADED, E.FRAME_GOOD, "first tier deserves a try", S.DEGRADED, (C.TRY_BETTER_TIER,))
    for event in (E.FRAME_LATE, E.FRAME_OVERDUE):
        yield Row(S.DEGRADED, event, "late reached D2", S.DEGRADED, (C.USE_FASTER_TIER,))
    for event in (E.FRAME_GOOD, E.TIER_RESTORED):
        yield Row(S.DEGRADED, event, "recovered", S.ACTIVE)

    yield Row(S.DEGRADED, E.WORKER_STARTED, "always", S.DEGRADED, (C.RUN_SELF_TEST,))
    for state in (S.LOADING, S.SELF_TEST, S.READY, S.ACTIVE, S.DEGRADED):
        back = S.LOADING if state in (S.LOADING, S.SELF_TEST) else S.DEGRADED
        yield Row(state, E.WORKER_LOST, "restarts exhausted", S.SAFE_OUTPUT, (C.STOP_WORKER,))
        yield Row(state, E.WORKER_LOST, "otherwise", back, (C.RESTART_WORKER,))
        yield Row(state, E.DEVICE_LOST, "not supervised", S.FAULT, (C.EXIT,))
        yield Row(state, E.DEVICE_LOST, "restarts exhausted", S.SAFE_OUTPUT, (C.STOP_WORKER,))
        yield Row(state, E.DEVICE_LOST, "otherwise", back, (C.RESTART_WORKER,))
        yield Row(state, E.STOP, "always", S.DRAINING, (C.DRAIN,))

    yield Row(S.SAFE_OUTPUT, E.RESET, "always", S.LOADING, (C.LOAD,))
    yield Row(S.SAFE_OUTPUT, E.DEVICE_LOST, "not supervised", S.FAULT, (C.EXIT,))
    for state in (S.UNCONFIGURED, S.SAFE_OUTPUT):
        yield Row(state, E.STOP, "always", S.DRAINING, (C.DRAIN,))
    yield Row(S.DRAINING, E.DRAINED, "always", S.UNCONFIGURED, (C.EXIT,))
    yield Row(S.DRAINING, E.DEVICE_LOST, "not supervised", S.FAULT, (C.EXIT,))
    # Whatever is not named above changes nothing: a late message of a worker that is gone, a second STOP.
    for state in S:
        for event in E:
            yield Row(state, event, "otherwise", state)


def _first_of_each(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Drop rows that can never be taken: those after one of the same state and event that always holds."""
    kept: list[Row] = []
    closed: set[tuple[State, EventKind]] = set()
    for row in rows:
        if (row.state, row.event) not in closed:
            kept.append(row)
        if row.condition in ("always", "otherwise"):
            closed.add((row.state, row.event))
    return tuple(kept)


TABLE: tuple[Row, ...] = _first_of_each(_rows())
