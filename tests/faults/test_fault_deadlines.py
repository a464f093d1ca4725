"""Time as a fault (faults.md 4.1 and 4.3): slow runs, silence, stamps from the past and the future. Embedded runtime."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from fmdeploy.runtime import Reason, Runtime
from fmdeploy.runtime.state import Policy, State
from support.bundles import Arrays
from support.clocks import Clock
from support.fdti import Fdti
from support.runtimes import frame, toy_bundle

PERIOD_MS = 200.0
DEADLINE_MS = 100.0


def make(deadline_ms: float | None = DEADLINE_MS, **options: Any) -> Runtime:
    """A runtime on one tier that has run once: the first frame of a process pays for what is lazy."""
    target = Runtime(toy_bundle(), tiers=("fp32",), **options)
    assert target.infer(frame(99)).valid
    target.publisher._deadline_ms = deadline_ms
    return target


def slow_down(target: Runtime, seconds: float) -> Any:
    """Let every run take so much longer, in real time; return the run as it was."""
    run = target.backend.run

    def slow(feeds: Arrays) -> Any:
        time.sleep(seconds)
        return run(feeds)

    target.backend.run = slow  # type: ignore[method-assign]
    return run


def test_F1_slow_inference_is_late(fdti: Fdti) -> None:
    target = make()
    run = slow_down(target, 1.5 * DEADLINE_MS / 1e3)
    start = time.monotonic_ns()
    found = target.infer(frame(), stamp_ns=start)
    detected_ms = (time.monotonic_ns() - start) / 1e6
    fdti.report(detected_ms - DEADLINE_MS, "after the deadline had passed")
    assert found.reasons == (Reason.LATE,)
    assert (found.valid, found.outputs, found.counters["missed"]) == (False, {}, 1)
    assert found.age_ms > DEADLINE_MS
    assert detected_ms < 2 * PERIOD_MS
    assert found.state == "ACTIVE", "one miss past the soft deadline costs one frame"
    target.backend.run = run  # type: ignore[method-assign]
    assert target.infer(frame(1)).valid


def test_F1_repeated_lateness_degrades() -> None:
    target = make(policy=Policy(late_in_a_row=2, hard_factor=1e6, recover_ms=0, good_frames=1))
    run = slow_down(target, 1.2 * DEADLINE_MS / 1e3)
    modes = [target.infer(frame(i)).mode for i in range(3)]
    assert modes == ["", "D1", "D1"]
    thinned = target.infer(frame(3))
    assert thinned.reasons == (Reason.DROPPED,), "at the reduced rate one of two frames runs"
    target.backend.run = run  # type: ignore[method-assign]
    found = target.infer(frame(4))
    assert (found.valid, found.state) == (True, "ACTIVE")


def test_F1_a_faster_tier_takes_over_at_d2() -> None:
    policy = Policy(late_in_a_row=1, hard_factor=1e6, reduced_rate=1)
    target = Runtime(toy_bundle(), tiers=("fp32", "int8-cpu"), policy=policy, standby=True)
    target.wait()
    # What the trial measured, on a machine where the difference is clear.
    slow, fast = target.inference.reports
    target.inference.reports = replace(slow, p50_ms=10.0), replace(fast, p50_ms=2.0)
    assert target.infer(frame(99)).valid
    target.publisher._deadline_ms = DEADLINE_MS
    slow_down(target, 1.2 * DEADLINE_MS / 1e3)
    assert [target.infer(frame(i)).mode for i in range(2)] == ["D1", "D2"]
    target.publisher._deadline_ms = 60_000
    found = target.infer(frame(2))
    assert (found.valid, found.tier, found.mode, found.reasons) == (True, "int8-cpu", "D2", (Reason.FALLBACK,))
    target.close()


def test_F1_control_a_slow_run_within_its_deadline() -> None:
    target = make(deadline_ms=60_000)
    slow_down(target, 0.15)
    found = target.infer(frame())
    assert (found.valid, found.reasons, found.counters["missed"]) == (True, (), 0)


def test_F2_hard_deadline_degrades_at_once(fdti: Fdti) -> None:
    target = make()
    before = target.health().last_completed_seq
    run = target.backend.run
    entered, leave = threading.Event(), threading.Event()

    def stuck(feeds: Arrays) -> Any:
        entered.set()
        leave.wait()
        return run(feeds)

    target.backend.run = stuck  # type: ignore[method-assign]
    results: list[Any] = []
    start = time.monotonic_ns()
    thread = threading.Thread(target=lambda: results.append(target.infer(frame(), stamp_ns=start)))
    thread.start()
    assert entered.wait(30)
    health = target.health()
    assert (health.live, health.last_completed_seq) == (True, before), "the heartbeat goes on, with the old number"
    time.sleep(10 * DEADLINE_MS / 1e3)
    leave.set()
    returned = time.monotonic_ns()
    thread.join()
    fdti.report((time.monotonic_ns() - returned) / 1e6, "after the run returned; before, only a second process can act")
    found = results[0]
    assert (found.valid, found.outputs, found.reasons) == (False, {}, (Reason.LATE,))
    assert (found.state, found.mode) == ("DEGRADED", "D1")
    target.backend.run = run  # type: ignore[method-assign]
    after = target.infer(frame(1))
    assert (after.valid, after.mode) == (True, "D1"), "the next frame is fresh, and flagged"


def test_F2_control_no_deadline_nothing_is_late() -> None:
    target = make(deadline_ms=None)
    slow_down(target, 0.3)
    found = target.infer(frame())
    assert (found.valid, found.state) == (True, "ACTIVE")


TIMEOUT_MS = 150.0


def test_F12_sensor_dropout(fdti: Fdti) -> None:
    target = make(deadline_ms=None, policy=Policy(input_timeout_ms=TIMEOUT_MS, hold_ms=60_000))
    last = target.infer(frame(1))
    start = time.monotonic_ns()
    found = None
    while found is None:
        time.sleep(0.005)
        found = target.poll()
    fdti.report((time.monotonic_ns() - start) / 1e6, f"input timeout {TIMEOUT_MS:g} ms, polled every 5 ms")
    assert (found.valid, found.mode, found.reasons) == (False, "D3", (Reason.NO_INPUT,))
    assert (time.monotonic_ns() - start) / 1e6 < TIMEOUT_MS + PERIOD_MS
    assert found.stamp_ns == last.stamp_ns, "the last good result keeps its stamp, so that its age grows"
    assert found.age_ms > TIMEOUT_MS
    assert found.outputs["bev"] is last.outputs["bev"]
    later = target.poll()
    assert later is not None
    assert later.age_ms > found.age_ms
    assert later.seq == found.seq + 1


def test_F12_the_last_result_is_not_held_for_ever() -> None:
    clock = Clock()
    policy = Policy(input_timeout_ms=TIMEOUT_MS, hold_ms=500, good_frames=2, recover_ms=300)
    target = Runtime(toy_bundle(), tiers=("fp32",), clock=clock, policy=policy)
    assert target.infer(frame()).valid
    seen = []
    for _ in range(4):
        clock.pass_ms(200)
        held = target.poll()
        assert held is not None
        seen.append((held.mode, bool(held.outputs), held.valid))
    assert seen == [("D3", True, False), ("D3", True, False), ("D4", False, False), ("D4", False, False)]
    assert target.health().reasons[0].startswith("NO_INPUT: nothing arrived")
    back = []
    for number in range(1, 5):
        clock.pass_ms(200)
        again = target.infer(frame(number))
        back.append((again.valid, again.mode, again.outputs != {}))
    assert back == [(False, "D4", False), (True, "", True), (True, "", True), (True, "", True)]


def test_F12_control_frames_that_arrive_in_time() -> None:
    clock = Clock()
    target = Runtime(toy_bundle(), tiers=("fp32",), clock=clock, policy=Policy(input_timeout_ms=TIMEOUT_MS))
    for number in range(20):
        clock.pass_ms(TIMEOUT_MS * 0.9)
        assert target.poll() is None
        assert target.infer(frame(number)).valid


def timeless(**options: Any) -> tuple[Runtime, Clock]:
    """A runtime whose clock the test moves."""
    clock = Clock()
    return Runtime(toy_bundle(), tiers=("fp32",), deadline_ms=DEADLINE_MS, clock=clock, **options), clock


def test_F14_stale_stamps(fdti: Fdti) -> None:
    target, clock = timeless()
    runs = []
    run = target.backend.run
    target.backend.run = lambda feeds: runs.append(1) or run(feeds)  # type: ignore[method-assign, func-returns-value]
    with fdti.detecting("one frame"):
        found = target.infer(frame(), stamp_ns=clock.now - 3_000_000_000)
    assert (found.reasons, found.valid, found.outputs) == ((Reason.STALE,), False, {})
    assert found.age_ms == 3000
    assert not runs, "what is too old is not even run"
    assert found.counters["rejected"] == 1


def test_F14_stale_for_long_is_no_perception() -> None:
    target, clock = timeless(policy=Policy(hold_ms=0))
    modes = []
    for number in range(8):
        clock.pass_ms(200)
        modes.append(target.infer(frame(number), stamp_ns=clock.now - 3_000_000_000 + number).mode)
    assert modes[0] == ""
    assert modes[-1] == "D4"


def test_F14_control_fresh_stamps() -> None:
    target, clock = timeless()
    for number in range(5):
        clock.pass_ms(200)
        assert target.infer(frame(number), stamp_ns=clock.now - 40_000_000).valid


@pytest.mark.parametrize(("shift_ms", "word"), [(1.0, "1.0 ms in the future"), (0.0, "repeats"), (-5.0, "is older than"),
                                                (-1e9, "is no time")], ids=["future", "duplicate", "order", "zero"])
def test_F15_wrong_stamps(fdti: Fdti, shift_ms: float, word: str) -> None:
    target, clock = timeless()
    assert target.infer(frame(0), stamp_ns=clock.now).valid
    with fdti.detecting(word):
        found = target.infer(frame(1), stamp_ns=max(0, clock.now + int(shift_ms * 1e6)))
    assert found.reasons[0] is Reason.BAD_STAMP
    assert word in found.findings[0].detail
    assert (found.valid, found.outputs) == (False, {})
    clock.pass_ms(200)
    assert target.infer(frame(2), stamp_ns=clock.now).valid, "one wrong stamp does not poison the stream"


def test_F15_control_stamps_in_order() -> None:
    target, clock = timeless()
    for number in range(10):
        clock.pass_ms(1)
        found = target.infer(frame(number), stamp_ns=clock.now)
        assert (found.valid, found.state) == (True, State.ACTIVE.value)
