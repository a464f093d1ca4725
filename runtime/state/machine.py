"""The state machine: a pure function of status, event and policy. It reads no clock and does nothing by itself.

    status, commands = step(status, Event(EventKind.FRAME_LATE, at_ns), policy)

One step counts the event, lets the ladder (`ladder.py`) judge which causes hold, and takes the first row of the table
(`table.py`) that fits. Both tables are the machine: there is no transition beside them.
"""

from __future__ import annotations

from fmdeploy.runtime.state.conditions import CONDITIONS, proven
from fmdeploy.runtime.state.kinds import (
    NS_PER_MS,
    SERVING,
    Cause,
    Command,
    Event,
    EventKind,
    Held,
    Mode,
    Policy,
    State,
    Status,
)
from fmdeploy.runtime.state.ladder import LADDER, RUNNING, Effect, Rule
from fmdeploy.runtime.state.table import TABLE, Row

MASK_64 = (1 << 64) - 1
MAX_RELAPSES = 5
NOT_GOOD = frozenset({EventKind.FRAME_BAD, EventKind.FRAME_LATE, EventKind.FRAME_OVERDUE, EventKind.BACKEND_FAILED,
                      EventKind.NO_INPUT})
LATE_EVENTS = frozenset({EventKind.FRAME_LATE, EventKind.FRAME_OVERDUE})
INVALID_EVENTS = frozenset({EventKind.FRAME_BAD, EventKind.BACKEND_FAILED})

_RULES: dict[EventKind, tuple[Rule, ...]] = {
    kind: tuple(rule for rule in LADDER if rule.event is kind) for kind in EventKind
}
_ROWS: dict[tuple[State, EventKind], list[Row]] = {}
for _row in TABLE:
    _ROWS.setdefault((_row.state, _row.event), []).append(_row)


def step(status: Status, event: Event, policy: Policy) -> tuple[Status, tuple[Command, ...]]:
    """Return the status after an event, and what its owner must do."""
    now = _count(status, event, policy)
    commands: tuple[Command, ...] = ()
    for rule in _RULES[event.kind]:
        if status.state in rule.states:
            now, fired = _judge(rule, status, now, event, policy)
            commands += rule.commands if fired else ()
    if event.kind is EventKind.FRAME_GOOD and status.state in SERVING:
        now = _ease(now, event, policy)
    row = transition(status, now, event, policy)
    return _remember(status, now._replace(state=row.then), event, policy), commands + row.commands


def transition(before: Status, now: Status, event: Event, policy: Policy) -> Row:
    """Return the row of the table that is taken."""
    rows = _ROWS[before.state, event.kind]
    return next(row for row in rows if CONDITIONS[row.condition](before, now, event, policy))


def is_calm(status: Status) -> bool:
    """Whether a good frame changes nothing: then a publisher need not ask the machine."""
    return (status.state is State.ACTIVE
            and not (status.held or status.late or status.late_bits or status.failed or status.bad))


def _count(status: Status, event: Event, policy: Policy) -> Status:
    kind, at = event.kind, event.at_ns
    if kind in (EventKind.WORKER_LOST, EventKind.DEVICE_LOST):
        if status.state not in RUNNING or (kind is EventKind.DEVICE_LOST and not policy.supervised):
            return status
        recent = tuple(t for t in status.restarts if at - t < policy.restart_window_ms * NS_PER_MS)
        return status._replace(restarts=(*recent, at))
    if status.state not in SERVING:
        return status
    if kind is EventKind.FRAME_GOOD:
        return status._replace(late=0, late_bits=status.late_bits << 1 & MASK_64, failed=0, bad=0)
    if kind in LATE_EVENTS:
        bits = (status.late_bits << 1 | 1) & MASK_64
        status = status._replace(late=status.late + 1, late_bits=bits)
    if kind in INVALID_EVENTS:
        first = at if status.bad == 0 else status.bad_since_ns
        failed = status.failed + 1 if kind is EventKind.BACKEND_FAILED else 0
        status = status._replace(bad=status.bad + 1, bad_since_ns=first, failed=failed)
    if kind in NOT_GOOD and status.held:
        status = status._replace(held=tuple(held._replace(good=0) for held in status.held))
    return status


def _judge(rule: Rule, before: Status, now: Status, event: Event, policy: Policy) -> tuple[Status, bool]:
    """Apply one rule of the ladder; also say whether its condition held."""
    if not CONDITIONS[rule.condition](before, now, event, policy):
        return _refresh(rule, now, event), False
    if rule.cause is None:
        return _judge_all(rule, now), True
    held, others = now.find(rule.cause), tuple(held for held in now.held if held.cause is not rule.cause)
    changed = _effect(rule, held, event, policy)
    now = now._replace(held=others if changed is None else (*others, changed))
    if rule.cause is Cause.LATE:
        now = now._replace(late=0, late_bits=0)  # the next rung needs misses of its own
    elif rule.cause is Cause.BACKEND:
        now = now._replace(failed=0)
    return now, True


def _judge_all(rule: Rule, now: Status) -> Status:
    if rule.effect is Effect.EXPIRE:
        causes = (held._replace(rung=rule.rung) if held.rung is Mode.D3 else held for held in now.held)
        return now._replace(held=tuple(causes))
    # A hot board is hot after a reset, too; that a worker died, or a model failed, is what the operator has dealt with.
    conditions = (Cause.HEAT, Cause.MEMORY, Cause.SENSOR, Cause.MONITOR)
    kept = tuple(held for held in now.held if held.lasting and held.cause in conditions)
    return Status(state=now.state, held=kept)


def _effect(rule: Rule, held: Held | None, event: Event, policy: Policy) -> Held | None:
    at, was = event.at_ns, held.rung if held is not None else Mode.NONE
    if rule.effect in (Effect.RAISE, Effect.LAST, Effect.CLIMB):
        wanted = policy.sensor_mode if rule.cause is Cause.SENSOR else rule.rung
        if rule.effect is Effect.CLIMB and held is not None:
            wanted = Mode(min(was + 1, Mode.D4))
        assert rule.cause is not None
        return Held(rule.cause, max(was, wanted), at, rule.effect is Effect.LAST, 0, event.detail)
    if held is None or rule.effect is Effect.CLEAR:
        return None
    rung = min(was, rule.rung) if rule.effect is Effect.LOWER else was
    return held._replace(rung=rung, since_ns=at, lasting=False, good=0)


def _refresh(rule: Rule, now: Status, event: Event) -> Status:
    """Evidence that is too weak to raise a cause still says that it is not over."""
    if rule.effect not in (Effect.RAISE, Effect.CLIMB, Effect.LAST):
        return now
    held = tuple(held._replace(since_ns=event.at_ns, good=0) if held.cause is rule.cause else held for held in now.held)
    return now._replace(held=held)


def _ease(now: Status, event: Event, policy: Policy) -> Status:
    """Count a good frame for every cause, and let go of those it proves to be over."""
    kept = []
    for held in now.held:
        if not proven(held, now, event, policy):
            kept.append(held._replace(good=held.good + 1))
        elif held.cause is Cause.FALLBACK:
            kept.append(held._replace(since_ns=event.at_ns, good=0))  # the first tier is tried now; then wait again
        elif held.lasting:
            kept.append(held)
        elif held.cause is Cause.LATE and held.rung > Mode.D1:
            # Rung by rung: with fewer frames or a smaller model, being in time proves nothing about the full load.
            kept.append(held._replace(rung=Mode(min(held.rung, Mode.D3) - 1), since_ns=event.at_ns, good=0))
    return now._replace(held=tuple(kept))


def _remember(before: Status, now: Status, event: Event, policy: Policy) -> Status:
    """Keep when the last recovery was: a cause that comes back soon waits longer the next time."""
    if before.held and not now.held:
        return now._replace(recovered_ns=event.at_ns)
    if now.held and not before.held and now.recovered_ns is not None:
        soon = event.at_ns - now.recovered_ns < policy.relapse_ms * NS_PER_MS
        return now._replace(relapses=min(now.relapses + 1, MAX_RELAPSES) if soon else 0)
    return now
