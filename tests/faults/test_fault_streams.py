"""What is wrong with a frame only beside the ones before it (T10, F13): frozen, repeated, torn.

Fault detection times are frames at 10 Hz: from the first wrong frame to the first one that says so.
"""

from __future__ import annotations

import numpy as np
import pytest

from fmdeploy.runtime import GuardConfig, Reason
from fmdeploy.runtime.guards.content import Guards
from fmdeploy.runtime.guards.stream import LIVE_AFTER
from support.bundles import Arrays
from support.fdti import Fdti
from support.guards import PERIOD_MS, guards_of, reasons
from support.runtimes import frame, runtime

DEBOUNCE = 10  # frames: GuardConfig.frozen_after


def first_alarm(guards: Guards, frames: list[Arrays], reason: Reason) -> int | None:
    """Number of the first frame with a reason."""
    return next((number for number, given in enumerate(frames) if reason in reasons(guards, given)), None)


def stopped(count: int, of: int = 1) -> list[Arrays]:
    """A lidar that goes on, and a camera that repeats its last `of` pictures in new buffers."""
    return [{"lidar": frame(500 + i)["lidar"], "camera": frame(900 + i % of)["camera"]} for i in range(count)]


def test_F13_frozen_camera(fdti: Fdti) -> None:
    target = runtime(guards=GuardConfig(frozen_after=DEBOUNCE))
    for seed in range(5):
        assert target.infer(frame(seed)).valid
    for repeats, given in enumerate(stopped(30)):
        found = target.infer(given)
        if found.valid:
            assert repeats < DEBOUNCE
            continue
        assert found.reasons == (Reason.FROZEN,)
        assert "camera" in found.findings[0].detail
        assert "lidar" not in str(found.findings)
        break
    fdti.report(repeats * PERIOD_MS, f"{repeats} frames at 10 Hz")
    assert repeats <= DEBOUNCE + 2
    assert not target.infer(stopped(1)[0]).valid, "it stays frozen as long as it lasts"


def test_F13_the_camera_moves_again() -> None:
    target = runtime(guards=GuardConfig(frozen_after=3))
    for given in stopped(8):
        found = target.infer(given)
    assert not found.valid
    assert Reason.FROZEN not in [code for seed in range(5) for code in target.infer(frame(seed)).reasons]


def test_F13_control_a_moving_camera_is_not_frozen() -> None:
    target = runtime(guards=GuardConfig(frozen_after=3))
    assert [target.infer(frame(seed)).reasons for seed in range(40)] == [()] * 40
    same = frame()["camera"]
    codes: list[Reason] = []
    for seed in range(12):  # one value moves, far from the rows that are kept
        moved = same.copy()
        moved[5, 3, seed] = 1 - moved[5, 3, seed]
        codes += target.infer({"lidar": frame(seed)["lidar"], "camera": moved}).reasons
    assert Reason.FROZEN not in codes, "one pixel is enough: the whole frame decides"


def test_T10_frozen_frame(fdti: Fdti) -> None:
    guards = guards_of(config=GuardConfig())
    at = first_alarm(guards, [frame(1), frame(2), *stopped(20)], Reason.FROZEN)
    assert at is not None
    late = at - 2
    fdti.report(late * PERIOD_MS, f"{late} frames at 10 Hz")
    assert late <= DEBOUNCE + 2


def test_T10_two_frames_in_turn(fdti: Fdti) -> None:
    guards = guards_of(config=GuardConfig())
    at = first_alarm(guards, [frame(1), frame(2), *stopped(20, of=2)], Reason.FROZEN)
    assert at is not None
    late = at - 2
    fdti.report(late * PERIOD_MS, f"alternating, {late} frames at 10 Hz")
    assert late <= DEBOUNCE + 3  # both pictures must repeat first
    assert "two pictures in turn" in guards.before(stopped(late + 2, of=2)[-1]).findings[0].detail


def moving(guards: Guards, count: int) -> Arrays:
    """Feed frames that all differ, without one alarm; return the last one."""
    for seed in range(count):
        last = frame(seed)
        assert reasons(guards, last) == []
    return last


def rows_of(new: Arrays, old: Arrays) -> Arrays:
    """The upper half is new, the lower half is the previous frame's."""
    return {name: np.concatenate([new[name][:, :8], old[name][:, 8:]], axis=1) for name in new}


def channels_of(new: Arrays, old: Arrays) -> Arrays:
    """The first half of the buffer is new."""
    return {name: np.concatenate([new[name][: len(new[name]) // 2], old[name][len(new[name]) // 2:]]) for name in new}


@pytest.mark.parametrize("tear", [rows_of, channels_of])
@pytest.mark.parametrize("stale", ["second half", "first half"])
def test_T10_torn_frame(tear: object, stale: str, fdti: Fdti) -> None:
    assert callable(tear)
    guards = guards_of(config=GuardConfig())
    old, new = moving(guards, LIVE_AFTER + 2), frame(9999)
    torn = tear(new, old) if stale == "second half" else tear(old, new)
    with fdti.detecting(f"in the torn frame itself, {stale} stale"):
        found = guards.before(torn).findings
    assert {finding.code for finding in found} == {Reason.TORN}
    assert {finding.detail.split(":")[0] for finding in found} == {"lidar", "camera"}
    assert reasons(guards, frame(10_001)) == [], "the next frame is whole"


def test_T10_scene_that_stands_still_in_one_half_is_believed_soon() -> None:
    guards = guards_of(config=GuardConfig())
    last = moving(guards, LIVE_AFTER + 2)
    codes = [reasons(guards, rows_of(frame(5000 + i), last)) for i in range(40)]
    assert [bool(found) for found in codes] == [True] * 3 + [False] * 37


@pytest.mark.parametrize("change", [lambda x: x[:, :, ::-1], lambda x: x[:, ::-1], lambda x: np.roll(x, 1, axis=1)],
                         ids=["mirrored", "upside down", "shifted rows"])
def test_T10_stopped_and_changed_in_turn(change: object) -> None:
    """A picture that stands still stays frozen, whatever is done to every second copy of it."""
    assert callable(change)
    guards, still = guards_of(config=GuardConfig()), frame()["camera"]
    other = np.ascontiguousarray(change(still))
    frames = [{"lidar": frame(i)["lidar"], "camera": (other if i % 2 else still).copy()} for i in range(20)]
    at = first_alarm(guards, frames, Reason.FROZEN)
    assert at is not None
    assert at <= DEBOUNCE + 3


def test_T10_control_equal_sums_and_equal_rows_are_not_frozen_or_torn() -> None:
    guards = guards_of(config=GuardConfig(frozen_after=2))
    one = frame()
    for number in range(30):  # mirrored, flipped, rolled: the same sums, never the same picture twice in three
        other = {name: np.ascontiguousarray(np.roll(array, number % 5, axis=2)) for name, array in one.items()}
        assert reasons(guards, other) == []


def test_T10_control_a_thousand_clean_frames() -> None:
    guards = guards_of(config=GuardConfig())
    assert sum(bool(reasons(guards, frame(seed))) for seed in range(1000)) == 0
