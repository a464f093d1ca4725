"""What holds for every sequence of events, and the stories the thresholds are for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmdeploy.runtime.state import Cause, Command, Event, EventKind, Mode, Policy, State, Status, is_calm, step
from fmdeploy.runtime.state.kinds import SERVING
from fmdeploy.runtime.state.machine import _ROWS

S = 10**9
MS = 10**6
E = EventKind
# A policy whose thresholds random sequences reach.
QUICK = Policy(late_in_a_row=2, late_of_64=4, bad_in_a_row=2, invalid_ms=100, backend_errors=2, good_frames=2,
               recover_ms=200, relapse_ms=1000, better_tier_ms=500, max_restarts=1, restart_window_ms=2000)
POLICIES = st.sampled_from([QUICK, Policy(), Policy(**{**QUICK.__dict__, "supervised": True})])
# Frames are what mostly happens, and in bursts: without them hardly any sequence reaches a threshold.
KINDS = st.one_of(
    st.just(E.FRAME_GOOD),
    st.sampled_from([E.FRAME_LATE, E.FRAME_BAD, E.BACKEND_FAILED, E.NO_INPUT, E.HELD_TOO_LONG]),
    st.sampled_from([E.WORKER_LOST, E.WORKER_STARTED, E.SELF_TEST_PASSED, E.RESET, E.TIER_CHANGED]),
    st.sampled_from([kind for kind in E if kind not in (E.STOP, E.DEVICE_LOST)]),
    st.sampled_from(list(E)),
)
BURSTS = st.lists(st.tuples(KINDS, st.integers(-50, 400), st.integers(1, 5)), min_size=5, max_size=25)
STEPS = BURSTS.map(lambda bursts: [(kind, wait) for kind, wait, count in bursts for _ in range(count)])
STARTS = st.sampled_from([(), (E.VERIFIED, E.LOADED), *[(E.VERIFIED, E.LOADED, E.SELF_TEST_PASSED)] * 6])
UNHEALTHY = (State.UNCONFIGURED, State.LOADING, State.SELF_TEST, State.SAFE_OUTPUT, State.FAULT, State.DRAINING)
CAUSES_OF = {
    E.FRAME_LATE: Cause.LATE, E.FRAME_OVERDUE: Cause.LATE, E.FRAME_BAD: Cause.BAD_FRAMES, E.NO_INPUT: Cause.NO_INPUT,
    E.BACKEND_FAILED: Cause.BACKEND,
}

Walk = list[tuple[Status, Event, Status, tuple[Command, ...]]]


def walk(start: tuple[EventKind, ...], steps: list[tuple[EventKind, int]], policy: Policy) -> Walk:
    """Every step of a sequence: before, event, after, commands. Times are relative, in ms; a clock may even go back."""
    status, at, seen = Status(), 1000 * S, []
    for kind, wait_ms in [*((kind, 10) for kind in start), *steps]:
        at += wait_ms * MS
        event = Event(kind, at)
        after, commands = step(status, event, policy)
        seen.append((status, event, after, commands))
        status = after
    return seen


@settings(max_examples=250, deadline=None)
@given(STARTS, STEPS, POLICIES)
def test_no_sequence_makes_an_unhealthy_state_valid(
    start: tuple[EventKind, ...], steps: list[tuple[EventKind, int]], policy: Policy
) -> None:
    for before, event, after, _ in walk(start, steps, policy):
        if after.state in UNHEALTHY or after.mode in (Mode.D3, Mode.D4):
            assert not after.may_be_valid
        assert after.may_be_valid == (after.state is State.ACTIVE or after.mode in (Mode.D1, Mode.D2))
        assert (after.state is State.DEGRADED) == (after.mode is not Mode.NONE)
        assert after.state is not State.ACTIVE or not after.held
        if after.state in SERVING and before.state not in SERVING:
            assert (before.state, event.kind) == (State.SELF_TEST, E.SELF_TEST_PASSED)
        if after.state not in SERVING or any(h.cause in (Cause.WORKER, Cause.MONITOR) and h.rung is Mode.D4
                                             for h in after.held):
            assert not after.takes_frames


@settings(max_examples=200, deadline=None)
@given(STARTS, STEPS, POLICIES)
def test_latched_and_fault_stay(
    start: tuple[EventKind, ...], steps: list[tuple[EventKind, int]], policy: Policy
) -> None:
    for before, event, after, _ in walk(start, steps, policy):
        if before.state is State.FAULT:
            assert after == before
        if before.state is State.SAFE_OUTPUT and event.kind not in (E.RESET, E.STOP, E.DEVICE_LOST):
            assert after.state is State.SAFE_OUTPUT
        if before.state is State.SAFE_OUTPUT and event.kind is E.RESET:
            assert after.state is State.LOADING, "the operator unlatches; only a self-test brings frames back"


@settings(max_examples=250, deadline=None)
@given(STARTS, STEPS, POLICIES)
def test_the_ladder_goes_down_by_proof_alone(
    start: tuple[EventKind, ...], steps: list[tuple[EventKind, int]], policy: Policy
) -> None:
    """Each cause by itself: its mode rises on evidence, and falls only with the proof that the ladder names."""
    for before, event, after, _ in walk(start, steps, policy):
        for held in before.held:
            now = after.find(held.cause)
            if now is not None and now.rung >= held.rung:
                continue
            if event.kind is E.FRAME_GOOD:
                assert held.good + 1 >= policy.good_frames
                assert event.at_ns - held.since_ns >= policy.recover_ms * MS
                assert not held.lasting
                assert now is None or (held.cause is Cause.LATE and now.rung < held.rung)
            else:
                assert (held.cause, event.kind) in PROOFS or event.kind in (E.RESET, E.DRAINED)
                assert event.kind is not E.RESET or before.state is State.SAFE_OUTPUT


PROOFS = {
    (Cause.BACKEND, E.TIER_CHANGED), (Cause.SELF_TEST, E.TIER_CHANGED), (Cause.FALLBACK, E.TIER_RESTORED),
    (Cause.WORKER, E.SELF_TEST_PASSED), (Cause.SELF_TEST, E.SELF_TEST_PASSED),
    (Cause.MONITOR, E.MONITOR_BACK),
}


@settings(max_examples=200, deadline=None)
@given(STEPS, POLICIES)
def test_every_degradation_has_a_way_back(steps: list[tuple[EventKind, int]], policy: Policy) -> None:
    """When the conditions end and the proofs come, good frames suffice: no mode waits for frames it does not take."""
    seen = walk((E.VERIFIED, E.LOADED, E.SELF_TEST_PASSED), steps, policy)
    status, at = seen[-1][2], max(event.at_ns for _, event, _, _ in seen)
    if status.state is not State.DEGRADED:
        return
    for kind in (E.MONITOR_BACK, E.MEMORY_OK, E.COOL, E.SENSOR_BACK, E.WORKER_STARTED, E.SELF_TEST_PASSED,
                 E.TIER_RESTORED):
        status, _ = step(status, Event(kind, at), policy)
    for number in range(100):
        if status.state is State.ACTIVE:
            return
        assert status.takes_frames
        status, _ = step(status, Event(E.FRAME_GOOD, at + (number + 1) * 10 * S), policy)
    assert status.state is State.ACTIVE, status


@settings(max_examples=200, deadline=None)
@given(STEPS, POLICIES)
def test_a_slow_clock_never_recovers_early(steps: list[tuple[EventKind, int]], policy: Policy) -> None:
    """Good frames on a clock that has hardly moved since the evidence end no cause, however many they are."""
    seen = walk((E.VERIFIED, E.LOADED, E.SELF_TEST_PASSED), steps, policy)
    status, at = seen[-1][2], seen[-1][1].at_ns
    if status.state is not State.DEGRADED:
        return
    latest = max(held.since_ns for held in status.held)
    for number in range(200):
        now = min(at, latest) + number * policy.recover_ms * MS // 201
        before, status = status, step(status, Event(E.FRAME_GOOD, int(now)), policy)[0]
        fresh = [held for held in before.held if now - held.since_ns < policy.recover_ms * MS]
        assert all((found := status.find(held.cause)) and found.rung == held.rung for held in fresh)


@settings(max_examples=200, deadline=None)
@given(STARTS, STEPS, POLICIES, st.integers(-(10**15), 10**18))
def test_calm_means_that_a_good_frame_changes_nothing(
    start: tuple[EventKind, ...], steps: list[tuple[EventKind, int]], policy: Policy, at_ns: int
) -> None:
    """The publisher's short way is the machine's own answer, at any time."""
    for _, _, status, _ in walk(start, steps, policy):
        unchanged = step(status, Event(E.FRAME_GOOD, at_ns), policy) == (status, ())
        if is_calm(status):
            assert unchanged
            assert status.may_be_valid
        elif status.state is State.ACTIVE:
            assert not unchanged


@settings(max_examples=200, deadline=None)
@given(STARTS, STEPS, POLICIES)
def test_pure_and_bounded(start: tuple[EventKind, ...], steps: list[tuple[EventKind, int]], policy: Policy) -> None:
    first, second = walk(start, steps, policy), walk(start, steps, policy)
    assert first == second
    for _, _, after, _ in first:
        assert len({held.cause for held in after.held}) == len(after.held) <= len(Cause)
        assert after.late_bits < 1 << 64
        assert len(after.restarts) <= len(steps)
        assert 0 <= after.relapses <= 5


def serving(policy: Policy = QUICK) -> Status:
    return walk((E.VERIFIED, E.LOADED, E.SELF_TEST_PASSED, E.FRAME_GOOD), [], policy)[-1][2]


def told(status: Status, policy: Policy, *events: tuple[EventKind, int]) -> tuple[Status, list[Command]]:
    """Tell events at absolute times, in ms."""
    commands: list[Command] = []
    for kind, at_ms in events:
        status, more = step(status, Event(kind, at_ms * MS), policy)
        commands += more
    return status, commands


def good(count: int, at_ms: int, every_ms: int = 1) -> list[tuple[EventKind, int]]:
    return [(E.FRAME_GOOD, at_ms + number * every_ms) for number in range(count)]


def test_enter_fast_leave_slow() -> None:
    status, _ = told(serving(), QUICK, (E.FRAME_LATE, 0))
    assert status.state is State.ACTIVE
    status, _ = told(status, QUICK, (E.FRAME_LATE, 10))
    assert (status.state, status.mode) == (State.DEGRADED, Mode.D1)
    assert told(status, QUICK, *good(50, 11))[0].mode is Mode.D1, "enough frames, too soon"
    assert told(status, QUICK, *good(1, 900))[0].mode is Mode.D1, "late enough, too few frames"
    assert told(status, QUICK, *good(2, 900))[0].state is State.ACTIVE


def test_lateness_climbs_the_ladder_and_comes_back_rung_by_rung() -> None:
    status, commands = told(serving(), QUICK, *((E.FRAME_LATE, at) for at in range(8)))
    assert status.mode is Mode.D4
    assert commands == [Command.USE_FASTER_TIER]
    modes, at = [], 0
    while status.held:
        at += 1000
        status, _ = told(status, QUICK, *good(2, at))
        modes.append(status.mode)
    assert modes == [Mode.D2, Mode.D1, Mode.NONE]


def test_a_share_of_late_frames_is_enough() -> None:
    policy = Policy(late_in_a_row=100, late_of_64=4)
    pattern = [(E.FRAME_LATE if number % 10 == 0 else E.FRAME_GOOD, number) for number in range(31)]
    assert told(serving(policy), policy, *pattern[:30])[0].state is State.ACTIVE
    assert told(serving(policy), policy, *pattern)[0].mode is Mode.D1


def test_causes_compose() -> None:
    """A hot board that loses a camera is D2; the camera's proof leaves the heat, and the heat's the rest."""
    status, _ = told(serving(), QUICK, (E.THROTTLED, 0), (E.SENSOR_LOST, 10))
    assert (status.mode, status.reduced_rate) == (Mode.D2, True)
    status, _ = told(status, QUICK, (E.SENSOR_BACK, 1000), *good(5, 2000))
    assert ([held.cause for held in status.held], status.mode) == ([Cause.HEAT], Mode.D1)
    assert told(status, QUICK, *good(100, 10_000))[0].mode is Mode.D1, "it still throttles"
    status, _ = told(status, QUICK, (E.COOL, 20_000), *good(5, 21_000))
    assert status.state is State.ACTIVE


def test_fallback_is_left_only_for_a_tier_that_proved_itself() -> None:
    status, commands = told(serving(), QUICK, (E.BACKEND_FAILED, 0), (E.BACKEND_FAILED, 1))
    assert (status.mode, commands) == (Mode.D4, [Command.USE_NEXT_TIER])
    status, _ = told(status, QUICK, (E.TIER_CHANGED, 2))
    assert (status.mode, status.may_be_valid) == (Mode.D2, True)
    status, commands = told(status, QUICK, *good(20, 1000, 10))
    assert (status.mode, commands) == (Mode.D2, [Command.TRY_BETTER_TIER])
    status, commands = told(status, QUICK, *good(60, 1300, 10))
    assert commands == [Command.TRY_BETTER_TIER], "it is asked for again, later, where the first try brought nothing"
    assert told(status, QUICK, (E.TIER_RESTORED, 3000))[0].state is State.ACTIVE


def test_restarts_are_budgeted_and_latch() -> None:
    policy = Policy(supervised=True, max_restarts=2, restart_window_ms=1000)
    status, commands = told(serving(policy), policy, (E.WORKER_LOST, 0), (E.WORKER_STARTED, 10), (E.SELF_TEST_PASSED, 20))
    assert (status.state, status.mode) == (State.DEGRADED, Mode.D1), "the self-test is the proof; then it is on probation"
    assert commands == [Command.RESTART_WORKER, Command.RUN_SELF_TEST]
    status, _ = told(status, policy, (E.WORKER_LOST, 100))
    assert status.mode is Mode.D4
    assert told(status, policy, (E.WORKER_LOST, 2000))[0].state is State.DEGRADED, "the first ones are forgotten"
    status, commands = told(status, policy, (E.WORKER_LOST, 200))
    assert (status.state, commands) == (State.SAFE_OUTPUT, [Command.STOP_WORKER])
    status, _ = told(status, policy, (E.WORKER_STARTED, 300), (E.SELF_TEST_PASSED, 310), *good(100, 100_000))
    assert status.state is State.SAFE_OUTPUT
    status, commands = told(status, policy, (E.RESET, 200_000), (E.WORKER_STARTED, 200_001), (E.SELF_TEST_PASSED, 200_002))
    assert (status.state, status.restarts) == (State.READY, ())


def test_crash_loop_at_the_start_latches() -> None:
    policy = Policy(supervised=True, max_restarts=2)
    status, _ = told(Status(), policy, (E.VERIFIED, 0), (E.WORKER_LOST, 1), (E.WORKER_LOST, 2))
    assert status.state is State.LOADING
    assert told(status, policy, (E.WORKER_LOST, 3))[0].state is State.SAFE_OUTPUT


def test_a_cause_that_comes_back_soon_waits_longer() -> None:
    status, _ = told(serving(), QUICK, (E.NO_INPUT, 0), *good(2, 300))
    assert status.state is State.ACTIVE
    status, _ = told(status, QUICK, (E.NO_INPUT, 400), *good(5, 650))
    assert status.mode is Mode.D3, "200 ms were enough the first time"
    assert told(status, QUICK, *good(2, 900))[0].state is State.ACTIVE


def test_lost_device_is_a_fault_unless_another_process_can_help() -> None:
    status, commands = told(serving(), QUICK, (E.DEVICE_LOST, 0))
    assert (status.state, commands) == (State.FAULT, [Command.EXIT])
    policy = Policy(supervised=True)
    status, commands = told(serving(policy), policy, (E.DEVICE_LOST, 0))
    assert (status.mode, commands) == (Mode.D4, [Command.RESTART_WORKER])


def test_a_lying_table_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control for the properties: a row that lets SAFE_OUTPUT go by itself breaks the one about the latch."""
    key = State.SAFE_OUTPUT, E.FRAME_GOOD
    monkeypatch.setitem(_ROWS, key, (_ROWS[key][0]._replace(then=State.ACTIVE),))
    with pytest.raises(AssertionError):
        test_latched_and_fault_stay.hypothesis.inner_test(  # type: ignore[attr-defined]
            (E.VERIFIED, E.LOADED, E.SELF_TEST_FAILED), [(E.FRAME_GOOD, 1)], QUICK)


def test_random_sequences_reach_every_state_and_mode() -> None:
    """Control for the properties: what is never reached is never judged."""
    seen: set[object] = set()

    @settings(max_examples=400, deadline=None, derandomize=True, database=None)
    @given(STARTS, STEPS, POLICIES)
    def collect(start: tuple[EventKind, ...], steps: list[tuple[EventKind, int]], policy: Policy) -> None:
        for _, _, after, _ in walk(start, steps, policy):
            seen.update((after.state, after.mode, *(held.cause for held in after.held)))

    collect()
    assert seen == {*State, *Mode, *Cause}
