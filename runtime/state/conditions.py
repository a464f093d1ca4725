"""The conditions that rows of the ladder and of the table name, each a pure function.

`before` is the status when the event came, `now` the same with the event counted and, for the table, judged by the
ladder.
"""

from __future__ import annotations

from collections.abc import Callable

from fmdeploy.runtime.state.kinds import NS_PER_MS, Cause, Event, EventKind, Held, Mode, Policy, State, Status

Condition = Callable[[Status, Status, Event, Policy], bool]


def _late_too_often(before: Status, now: Status, event: Event, policy: Policy) -> bool:
    return now.late >= policy.late_in_a_row or now.late_bits.bit_count() >= policy.late_of_64


def _bad_for_too_long(before: Status, now: Status, event: Event, policy: Policy) -> bool:
    return now.bad >= policy.bad_in_a_row and event.at_ns - now.bad_since_ns >= policy.invalid_ms * NS_PER_MS


def _late_reached_d2(before: Status, now: Status, event: Event, policy: Policy) -> bool:
    was, held = before.find(Cause.LATE), now.find(Cause.LATE)
    return held is not None and held.rung is Mode.D2 and was is not None and was.rung < Mode.D2


def _first_tier_deserves_a_try(before: Status, now: Status, event: Event, policy: Policy) -> bool:
    held = before.find(Cause.FALLBACK)
    return held is not None and event.kind is EventKind.FRAME_GOOD and proven(held, before, event, policy)


def proven(held: Held, status: Status, event: Event, policy: Policy) -> bool:
    """Whether this good frame completes the proof of a cause: enough of them in a row, and long enough ago.

    A clock that stands still or runs backwards proves nothing.
    """
    wanted_ms = policy.better_tier_ms if held.cause is Cause.FALLBACK else policy.recover_ms
    passed_ns = event.at_ns - held.since_ns
    return held.good + 1 >= policy.good_frames and passed_ns >= wanted_ms * NS_PER_MS * 2**status.relapses


CONDITIONS: dict[str, Condition] = {
    "always": lambda before, now, event, policy: True,
    "otherwise": lambda before, now, event, policy: True,
    "degraded": lambda before, now, event, policy: bool(now.held),
    "recovered": lambda before, now, event, policy: not now.held,
    "latched": lambda before, now, event, policy: before.state is State.SAFE_OUTPUT,
    "draining": lambda before, now, event, policy: before.state is State.DRAINING,
    "supervised": lambda before, now, event, policy: policy.supervised,
    "not supervised": lambda before, now, event, policy: not policy.supervised,
    "restarts exhausted": lambda before, now, event, policy: len(now.restarts) > policy.max_restarts,
    "failed too often": lambda before, now, event, policy: now.failed >= policy.backend_errors,
    "late too often": _late_too_often,
    "bad for too long": _bad_for_too_long,
    "late reached D2": _late_reached_d2,
    "first tier deserves a try": _first_tier_deserves_a_try,
}
