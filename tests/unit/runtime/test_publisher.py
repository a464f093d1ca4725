"""What is published is valid only where findings and state allow it; the short way says what the long one would."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmdeploy.runtime.evidence import evidence
from fmdeploy.runtime.explain import REASON_OF_CAUSE, TEXT_OF_CAUSE, health_reasons, objections
from fmdeploy.runtime.frame import WARNINGS, Finding, Frame, Reason
from fmdeploy.runtime.inference import Result
from fmdeploy.runtime.publisher import Publisher
from fmdeploy.runtime.state import Cause, Event, EventKind, Held, Mode, Policy, State, Status, step
from support.clocks import Clock

E = EventKind
QUICK = Policy(late_in_a_row=2, bad_in_a_row=2, invalid_ms=50, backend_errors=2, good_frames=2, recover_ms=100,
               hold_ms=150, better_tier_ms=300, max_restarts=1, input_timeout_ms=200)


def outputs() -> dict[str, Any]:
    return {"bev": np.zeros((2, 3), np.float32)}


def result(*codes: Reason, empty: bool = False) -> Result:
    findings = tuple(Finding(code, "why") for code in codes)
    return Result({} if empty else outputs(), findings, "fp32", "m" * 64, "CPU", {})


def serving(policy: Policy = QUICK, deadline_ms: float | None = 100) -> tuple[Publisher, Clock]:
    clock = Clock()
    publisher = Publisher("b" * 64, deadline_ms=deadline_ms, clock=clock, policy=policy)
    for kind in (E.VERIFIED, E.LOADED, E.SELF_TEST_PASSED):
        publisher.tell(kind)
    return publisher, clock


def publish(publisher: Publisher, clock: Clock, found: Result, run_ms: float = 1, stamp_ms: float | None = None) -> Frame:
    ticket = publisher.arrive(None if stamp_ms is None else int(stamp_ms * 1e6))
    clock.pass_ms(run_ms)
    return publisher.publish(ticket, result(empty=True) if ticket.refused else found)


ACTIONS = st.one_of(
    st.tuples(st.just("frame"), st.sampled_from([(), (), (), (Reason.NOT_FINITE,), (Reason.BACKEND_ERROR,), (Reason.FROZEN,),
                                                 (Reason.UNUSUAL_INPUT,), (Reason.SENSOR_MODE,), (Reason.DEVICE_LOST,)]),
              st.sampled_from([1.0, 5.0, 120.0, 400.0])),
    st.tuples(st.just("tell"), st.sampled_from(list(E)), st.floats(0, 200)),
    st.tuples(st.just("poll"), st.none(), st.floats(0, 400)),
    st.tuples(st.just("nothing"), st.sampled_from([Reason.DROPPED, Reason.WORKER_LOST]), st.floats(0, 100)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(ACTIONS, min_size=5, max_size=40))
def test_no_unhealthy_or_stale_frame_is_valid(actions: list[tuple[str, Any, float]]) -> None:
    publisher, clock = serving()
    frames: list[tuple[Frame, bool]] = []
    for what, argument, ms in actions:
        if what == "frame":
            codes = argument
            dead = any(code in (Reason.NOT_FINITE, Reason.BACKEND_ERROR, Reason.DEVICE_LOST) for code in codes)
            frames.append((publish(publisher, clock, result(*codes, empty=dead), ms), ms > 100 or any(
                code not in WARNINGS for code in codes)))
        else:
            clock.pass_ms(ms)
            if what == "tell":
                publisher.tell(argument)
            elif what == "nothing":
                frames.append((publisher.publish_nothing(Finding(argument, "")), True))
            elif (polled := publisher.poll()) is not None:
                frames.append((polled, True))
    for frame, must_not_be_valid in frames:
        healthy = frame.state == "ACTIVE" or frame.mode in ("D1", "D2")
        assert not frame.valid or (healthy and not must_not_be_valid and frame.outputs)
        assert frame.valid or frame.findings, "an invalid frame says why"
        assert frame.valid == all(code in WARNINGS for code in frame.reasons)
        assert frame.mode != "D4" or frame.outputs == {}
        assert frame.state not in ("SAFE_OUTPUT", "FAULT", "DRAINING", "UNCONFIGURED") or frame.outputs == {}
        assert not frame.valid or frame.age_ms <= 100
        if frame.outputs and frame.mode == "D3":
            assert frame.age_ms <= max(QUICK.hold_ms, 100)
    numbers = [frame.seq for frame, _ in frames]
    assert numbers == sorted(set(numbers))
    if frames:
        assert frames[-1][0].counters["frames"] == len(frames)
        assert frames[-1][0].counters["valid"] == sum(frame.valid for frame, _ in frames)


def test_the_short_way_equals_the_machine() -> None:
    """A calm publisher asks nobody; its status and its frames are those of one that always asks."""
    short, clock = serving()
    long, _ = serving()
    long.clock = clock
    for number in range(20):
        long._calm = False
        one, two = publish(short, clock, result()), publish(long, clock, result())
        assert number == 0 or short._calm
        same = {key: value for key, value in one.record().items() if not key.endswith("_ns")}
        assert same == {key: value for key, value in two.record().items() if not key.endswith("_ns")}
        assert short.status == long.status == step(short.status, Event(E.FRAME_GOOD, clock.now), QUICK)[0]


def test_the_short_way_is_short() -> None:
    """Both in turn, at their best, so that a busy machine says the same as an idle one."""
    publisher, _ = serving(deadline_ms=1e9)
    publisher.clock = time.monotonic_ns
    good, best = result(), {True: float("inf"), False: float("inf")}
    publisher.publish(publisher.arrive(), good)
    for number in range(400):
        calm = number % 2 == 0
        start = time.perf_counter_ns()
        for _ in range(10):
            publisher._calm = calm
            publisher.publish(publisher.arrive(), good)
            publisher.take_commands()
        best[calm] = min(best[calm], (time.perf_counter_ns() - start) / 10e3)
    print(f"arrive + publish {best[True]:.2f} µs, with a walk through the tables {best[False]:.2f} µs")
    assert best[True] < 0.6 * best[False]


def test_d3_shows_the_last_good_result_with_its_age() -> None:
    publisher, clock = serving()
    good = publish(publisher, clock, result())
    clock.pass_ms(10)
    publisher.tell(E.NO_INPUT)
    held = publish(publisher, clock, result(Reason.NOT_FINITE, empty=True), 20)
    assert (held.mode, held.valid, held.stamp_ns) == ("D3", False, good.stamp_ns)
    assert held.outputs["bev"] is good.outputs["bev"]
    assert held.age_ms == 31
    with pytest.raises(ValueError, match="read-only"):
        good.outputs["bev"][0] = 1
    own = publish(publisher, clock, result(), 1)
    assert (own.valid, own.mode, own.age_ms) == (False, "D3", 1), "good again, but on probation"
    assert own.reasons == (Reason.NO_INPUT,)
    assert "1 of 2 good frames" in own.findings[0].detail
    clock.pass_ms(200)
    last = publish(publisher, clock, result(Reason.FROZEN))
    assert (last.mode, last.outputs) == ("D4", {}), "past the staleness limit there is nothing to show"


def test_reduced_rate_drops_every_second_frame_and_says_so() -> None:
    publisher, clock = serving()
    publish(publisher, clock, result())
    publisher.tell(E.THROTTLED, "tj 97 C")
    frames = [publish(publisher, clock, result()) for _ in range(6)]
    assert [frame.valid for frame in frames] == [True, False] * 3
    assert frames[0].reasons == (Reason.THROTTLED,)
    assert frames[0].findings[0].detail == "tj 97 C"
    assert frames[1].reasons == (Reason.DROPPED, Reason.THROTTLED)
    assert frames[-1].counters["dropped"] == 3
    assert {frame.mode for frame in frames} == {"D1"}


def test_sensor_that_comes_and_goes() -> None:
    publisher, clock = serving()
    modes = []
    for codes in [(), (Reason.SENSOR_MODE,), (Reason.SENSOR_MODE,), (), (), ()]:
        frame = publish(publisher, clock, result(*codes), 60)
        modes.append((frame.mode, frame.valid))
    assert modes == [("", True), ("D2", True), ("D2", True), ("D2", True), ("D2", True), ("", True)]


def test_commands_wait_until_they_are_taken() -> None:
    publisher, clock = serving()
    publish(publisher, clock, result())
    for _ in range(2):
        publish(publisher, clock, result(Reason.BACKEND_ERROR, empty=True))
    assert [command.value for command in publisher.take_commands()] == ["USE_NEXT_TIER"]
    assert publisher.take_commands() == ()


def test_counters_of_others_travel_with_frames() -> None:
    publisher, clock = serving()
    publish(publisher, clock, result())
    publisher.count("log_errors")
    publisher.count("log_errors", 2)
    assert publish(publisher, clock, result()).counters["log_errors"] == 3


def test_frames_before_ready_are_refused_and_not_judged() -> None:
    publisher = Publisher("b" * 64)
    ticket = publisher.arrive()
    assert ticket.refused
    frame = publisher.publish(ticket, result(empty=True))
    assert (frame.valid, frame.state, frame.reasons) == (False, "UNCONFIGURED", (Reason.NOT_READY,))
    assert publisher.status == Status()
    assert publisher.health().ready is False
    assert publisher.health().live is True


def test_health_names_the_worst_first() -> None:
    publisher, _ = serving()
    publisher.runs(model="m", tier="fp32", provider="CPU")
    publisher.tell(E.THROTTLED)
    publisher.tell(E.MONITOR_LOST, "its heartbeat is 3 s old")
    health = publisher.health()
    assert health.reasons == ("UNMONITORED: its heartbeat is 3 s old", "THROTTLED: the board throttles")
    assert (health.state, health.mode, health.ready, health.live) == ("DEGRADED", "D4", False, True)
    assert health.to_json()["counters"]["frames"] == 0
    assert health.to_json()["tier"] == "fp32"


def test_every_cause_and_state_has_words() -> None:
    assert set(REASON_OF_CAUSE) == set(TEXT_OF_CAUSE) == set(Cause)
    for state in State:
        held = (Held(Cause.NO_INPUT, Mode.D3, 0),) if state is State.DEGRADED else ()
        status = Status(state, held)
        assert bool(objections(status, QUICK)) == (not status.may_be_valid and state is not State.READY)
        assert bool(health_reasons(status)) == (state not in (State.READY, State.ACTIVE))


@pytest.mark.parametrize(("codes", "kind"), [
    ((), E.FRAME_GOOD), ((Reason.UNUSUAL_INPUT, Reason.FALLBACK), E.FRAME_GOOD), ((Reason.LATE,), E.FRAME_LATE),
    ((Reason.LATE, Reason.FROZEN), E.FRAME_BAD), ((Reason.STALE,), E.FRAME_BAD), ((Reason.BAD_STAMP,), E.FRAME_BAD),
    ((Reason.BACKEND_ERROR,), E.BACKEND_FAILED), ((Reason.DEVICE_LOST,), E.DEVICE_LOST), ((Reason.DROPPED,), None),
    ((Reason.WORKER_LOST,), None), ((Reason.NOT_FINITE_OUTPUT,), E.FRAME_BAD),
])
def test_evidence(codes: tuple[Reason, ...], kind: EventKind | None) -> None:
    findings = [Finding(code, "") for code in codes]
    assert [event for event, _ in evidence(findings, overdue=False, innocent=False)] == ([kind] if kind else [])


def test_threads_may_tell_while_others_publish() -> None:
    publisher, _ = serving(deadline_ms=None)
    publisher.clock = time.monotonic_ns
    stop = threading.Event()

    def tell() -> None:
        while not stop.is_set():
            publisher.tell(E.THROTTLED)
            publisher.tell(E.COOL)
            publisher.poll()

    thread = threading.Thread(target=tell)
    thread.start()
    try:
        frames = [publisher.publish(publisher.arrive(), result()) for _ in range(300)]
    finally:
        stop.set()
        thread.join()
    assert len({frame.seq for frame in frames}) == 300
    assert publisher.counters["frames"] >= 300


@pytest.mark.parametrize("stamp", [0, -1, float("nan")])
def test_a_stamp_that_is_no_time_is_refused(stamp: int) -> None:
    clock = Clock()
    publisher = Publisher("b", clock=clock)
    assert [found.code for found in publisher.arrive(stamp).findings] == [Reason.BAD_STAMP]
    assert publisher.arrive(clock.now).findings == (), "and does not poison the stream"


def test_a_deadline_that_is_no_number_is_never_met() -> None:
    clock = Clock()
    publisher = Publisher("b", deadline_ms=float("nan"), clock=clock)
    for kind in (EventKind.VERIFIED, EventKind.LOADED, EventKind.SELF_TEST_PASSED):
        publisher.tell(kind)
    assert [found.code for found in publisher.arrive(clock.now).findings] == [Reason.STALE]
    outputs = {"y": np.zeros(1, np.float32)}
    found = publisher.publish(publisher.arrive(), Result(outputs, (), "fp32", "m", "CPU", {}))
    assert (found.valid, found.reasons, found.outputs) == (False, (Reason.LATE,), {})
