"""Every row of the transition table and every rule of the ladder is reached and does what it says."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fmdeploy.runtime.state import Cause, Command, Event, EventKind, Held, Mode, Policy, State, Status, step
from fmdeploy.runtime.state.conditions import CONDITIONS
from fmdeploy.runtime.state.kinds import SERVING
from fmdeploy.runtime.state.ladder import LADDER, Effect, Rule
from fmdeploy.runtime.state.table import TABLE, Row

S = 10**9
AT = 1000 * S
POLICY = Policy(late_in_a_row=3, bad_in_a_row=2, backend_errors=2, good_frames=2, recover_ms=1000, max_restarts=2)
SUPERVISED = Policy(**{**POLICY.__dict__, "supervised": True})
OLD = AT - 100 * S


def lasting(cause: Cause, rung: Mode) -> Held:
    return Held(cause, rung, OLD, lasting=True)


def degraded_by(held: Held) -> Status:
    return Status(State.DEGRADED, (held,))


HEAT = lasting(Cause.HEAT, Mode.D1)
# How to make a condition hold, or fail, for a row: a status (its state is set to the row's) and a policy.
HOLDS: dict[str, Callable[[Row], tuple[Status, Policy]]] = {
    "always": lambda row: (Status(), POLICY),
    "degraded": lambda row: (Status(held=(HEAT,)), POLICY),
    "recovered": lambda row: (Status(held=(recovering(row.event),)), POLICY),
    "restarts exhausted": lambda row: (Status(restarts=(AT - 2 * S, AT - S)), SUPERVISED),
    "not supervised": lambda row: (Status(), POLICY),
    "late reached D2": lambda row: (Status(held=(Held(Cause.LATE, Mode.D1, OLD),), late=2), POLICY),
    "first tier deserves a try": lambda row: (
        Status(held=(Held(Cause.FALLBACK, Mode.D2, OLD, True, good=2),)), POLICY),
}
FAILS: dict[str, Callable[[Row], tuple[Status, Policy]]] = {
    "degraded": lambda row: (Status(), POLICY),
    "recovered": lambda row: (Status(held=(HEAT,)), POLICY),
    "restarts exhausted": lambda row: (Status(restarts=(AT - 2 * S,)), SUPERVISED),
    "not supervised": lambda row: (Status(), SUPERVISED),
    "late reached D2": lambda row: (Status(held=(Held(Cause.LATE, Mode.D2, OLD),)), POLICY),
    "first tier deserves a try": lambda row: (
        Status(held=(Held(Cause.FALLBACK, Mode.D2, AT - S, True, good=2),)), POLICY),
}


def recovering(event: EventKind) -> Held:
    """A cause that this very event ends."""
    if event is EventKind.TIER_RESTORED:
        return lasting(Cause.FALLBACK, Mode.D2)
    return Held(Cause.BACKEND, Mode.D4, OLD, good=5)


def name(row: Row) -> str:
    return f"{row.state.value}-{row.event.value}-{row.condition}"


@pytest.mark.parametrize("row", [row for row in TABLE if row.condition != "otherwise"], ids=name)
def test_row_is_taken_where_its_condition_holds(row: Row) -> None:
    status, policy = HOLDS[row.condition](row)
    after, commands = step(status._replace(state=row.state), Event(row.event, AT), policy)
    assert after.state is row.then
    assert set(row.commands) <= set(commands)


@pytest.mark.parametrize("row", [row for row in TABLE if row.condition in FAILS], ids=name)
def test_row_is_passed_where_its_condition_fails(row: Row) -> None:
    status, policy = FAILS[row.condition](row)
    after, commands = step(status._replace(state=row.state), Event(row.event, AT), policy)
    assert (after.state, tuple(commands)) != (row.then, row.commands)


@pytest.mark.parametrize("row", [row for row in TABLE if row.condition == "otherwise"], ids=name)
def test_otherwise(row: Row) -> None:
    policy = SUPERVISED if row.event is EventKind.DEVICE_LOST else POLICY
    held = (HEAT,) if row.state is State.DEGRADED else ()
    after, commands = step(Status(row.state, held), Event(row.event, AT), policy)
    assert after.state is row.then
    assert set(row.commands) <= set(commands)


RAISING_EFFECTS = (Effect.RAISE, Effect.CLIMB, Effect.LAST)


def test_every_pair_is_defined_and_nothing_else() -> None:
    closed = {(row.state, row.event) for row in TABLE if row.condition in ("always", "otherwise")}
    assert closed == {(state, event) for state in State for event in EventKind}
    assert {row.condition for row in TABLE} | {rule.condition for rule in LADDER} == set(CONDITIONS)
    raising = {rule.event for rule in LADDER if rule.effect in RAISING_EFFECTS}
    assert {row.event for row in TABLE if row.state is State.ACTIVE and row.then is State.DEGRADED} == raising
    assert set(HOLDS) | {"otherwise"} == {row.condition for row in TABLE}


def test_fault_and_latch_have_no_way_out_but_these() -> None:
    assert {row.event for row in TABLE if row.state is State.FAULT and row.then is not State.FAULT} == set()
    left = {(row.event, row.then) for row in TABLE if row.state is State.SAFE_OUTPUT and row.then is not row.state}
    assert left == {(EventKind.RESET, State.LOADING), (EventKind.STOP, State.DRAINING),
                    (EventKind.DEVICE_LOST, State.FAULT)}


def test_serving_begins_with_a_passed_self_test_only() -> None:
    into = {(row.state, row.event) for row in TABLE if row.then in SERVING and row.state not in SERVING}
    assert into == {(State.SELF_TEST, EventKind.SELF_TEST_PASSED)}


@pytest.mark.parametrize("rule", LADDER, ids=lambda rule: f"{rule.event.value}-{rule.cause and rule.cause.value}")
def test_rule_of_the_ladder(rule: Rule) -> None:
    before, policy = _before(rule)
    after, commands = step(before, Event(rule.event, AT, "why"), policy)
    assert set(rule.commands) <= set(commands)
    if rule.cause is None:
        _check_all(rule, after)
        return
    held = after.find(rule.cause)
    if rule.effect is Effect.CLEAR:
        assert held is None
    elif rule.effect is Effect.END:
        assert held is not None
        assert (held.lasting, held.good, held.since_ns) == (False, 0, AT)
    else:
        assert held is not None
        assert (held.rung, held.since_ns) == (rule.rung, AT)
        assert held.lasting == (rule.effect is Effect.LAST)


def _before(rule: Rule) -> tuple[Status, Policy]:
    ripe = {"late too often": Status(late=2), "failed too often": Status(failed=1),
            "bad for too long": Status(bad=5, bad_since_ns=OLD)}.get(rule.condition, Status())
    held: tuple[Held, ...] = ()
    if rule.cause is None:
        held = (Held(Cause.BAD_FRAMES, Mode.D3, OLD), HEAT)
    elif rule.effect in (Effect.END, Effect.CLEAR, Effect.LOWER):
        held = (lasting(rule.cause, Mode.D4),)
    special = {"latched": State.SAFE_OUTPUT, "draining": State.DRAINING}
    state = special.get(rule.condition, State.DEGRADED if held else State.ACTIVE)
    return ripe._replace(state=state, held=held), SUPERVISED if rule.condition == "supervised" else POLICY


def _check_all(rule: Rule, after: Status) -> None:
    if rule.effect is Effect.EXPIRE:
        assert [held.rung for held in after.held] == [Mode.D4, Mode.D1]
    else:
        assert after.held == (HEAT,), "a hot board is hot after a reset, too"
        assert (after.restarts, after.relapses) == ((), 0)


@pytest.mark.parametrize("rule", [rule for rule in LADDER if rule.condition not in ("always", "latched", "draining")],
                         ids=lambda rule: rule.event.value)
def test_rule_waits_for_its_condition(rule: Rule) -> None:
    before, _ = _before(rule)
    before = before._replace(late=0, failed=0, bad=0)
    after, commands = step(before, Event(rule.event, AT), POLICY)
    assert rule.cause is not None
    assert after.find(rule.cause) is None
    assert not set(rule.commands) & set(commands)


def test_commands_are_of_the_vocabulary() -> None:
    assert {command for row in TABLE for command in row.commands} | {c for r in LADDER for c in r.commands} == set(Command)
