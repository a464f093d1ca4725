"""The telemetry process: windows, tools that misbehave, and a reader that never waits."""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from fmdeploy.jetson.snapshot import Snapshot
from fmdeploy.jetson.taint import taints, unknowns
from fmdeploy.jetson.telemetry import Telemetry
from fmdeploy.jetson.watch import COOL, THROTTLED, Judge
from fmdeploy.jetson.window import Accumulator, Window
from support import waiting
from support.fakeboard import FakeBoard, orin_nano_jp62, pc

PATIENCE_S = 30.0
wait_for = functools.partial(waiting.wait_for, seconds=PATIENCE_S)


@pytest.fixture
def board(tmp_path: Path) -> FakeBoard:
    return orin_nano_jp62(tmp_path / "board")


def test_a_quiet_run_is_no_taint(board: FakeBoard) -> None:
    with Telemetry(board.root) as telemetry:
        assert telemetry.begin()
        wait_for(lambda: (window := telemetry.window()) and window.samples > 8 and window.tegrastats == "ok")
        window = telemetry.end()
    assert window is not None
    assert (taints(window), unknowns(window)) == ([], [])
    assert window.power_modes == ["25W"]
    assert window.temperatures_c == {"cpu-thermal": 51.5, "tj-thermal": 52.8}
    assert window.clocks_mhz["gpu"] == (612.0, 612.0)
    assert window.events == {"oc1": 0, "oc2": 0, "oc3": 0}
    assert window.rails_mw["VDD_IN"] == (3913, 3913)
    assert (window.swap_ins, window.used_delta_mib, window.nvmap_delta_mib) == (0, 0.0, 0.0)


def test_peaks_between_two_moments(board: FakeBoard) -> None:
    with Telemetry(board.root) as telemetry:
        telemetry.begin()
        board.memory(available_mib=3400, nvmap_mib=720, swap_ins=11, swap_free_mib=3800)
        board.gpu(hz=290_000_000, load=999)
        # One sample may have come between the two files: wait for one that saw both.
        wait_for(lambda: (window := telemetry.window()) and window.nvmap_delta_mib and window.gpu_load_percent == 99.9)
        board.memory(swap_ins=11)
        board.gpu()
        window = telemetry.end()
        assert telemetry.begin()
        assert telemetry.end() == Window(**{**vars(window), **_calm(telemetry)}), "a new window has forgotten it"
    assert window is not None
    assert (window.used_delta_mib, window.nvmap_delta_mib, window.swap_ins) == (1000.0, 600.0, 11)
    assert (window.clocks_mhz["gpu"], window.gpu_load_percent) == ((290.0, 612.0), 99.9)
    assert taints(window) == ["gpu fell to 290 MHz, below its floor of 306 MHz", "11 pages came back from swap"]


def _calm(telemetry: Telemetry) -> dict[str, Any]:
    window = telemetry.window()
    assert window is not None
    assert (window.swap_ins, window.used_delta_mib, window.clocks_mhz["gpu"], window.pushed_down) == (0, 0.0, (612.0, 612.0), {})
    return vars(window)


def test_rate_and_a_real_process(tmp_path: Path) -> None:
    """On this very machine: at least 10 Hz, and PSS of a process that is watched from another one."""
    with Telemetry() as telemetry:
        telemetry.begin()
        assert telemetry.watch(os.getpid())
        wait_for(lambda: (window := telemetry.window()) and window.samples >= 15)
        window = telemetry.end()
    assert window is not None
    assert window.process_peak_mib is not None
    assert window.process_pss_mib is not None
    assert 10 < window.process_pss_mib <= window.process_peak_mib
    assert window.rate_hz is not None
    assert window.rate_hz >= 5, "20 Hz are asked for; a busy machine may give less"


def test_the_reader_never_waits(board: FakeBoard) -> None:
    """Also when the process is stopped in the middle; what it said before is soon no answer any more."""
    with Telemetry(board.root) as telemetry:
        assert telemetry.latest() is None, "nothing is known yet"
        wait_for(telemetry.latest)
        os.kill(telemetry.pid, signal.SIGSTOP)
        start, calls, slowest = time.monotonic(), 0, 0.0
        while telemetry.latest() is not None and time.monotonic() - start < PATIENCE_S:
            before = time.monotonic()
            telemetry.latest()
            slowest, calls = max(slowest, time.monotonic() - before), calls + 1
        assert telemetry.latest() is None
        assert telemetry.window() is None
        assert calls > 100
        assert slowest < 0.3
        os.kill(telemetry.pid, signal.SIGCONT)
        wait_for(telemetry.latest)


def test_a_reader_that_sleeps_does_not_hold_up_the_process(board: FakeBoard) -> None:
    with Telemetry(board.root, rate_hz=500.0) as telemetry:
        telemetry.begin()
        time.sleep(1.5)  # fills the socket many times over
        window = telemetry.end()
    assert window is not None
    assert window.samples > 60
    assert window.longest_gap_ms < 1000


def test_a_lost_process_is_unknown(board: FakeBoard) -> None:
    with Telemetry(board.root) as telemetry:
        assert telemetry.begin()
        os.kill(telemetry.pid, signal.SIGKILL)
        assert telemetry.end() is None
        assert not telemetry.begin()
        wait_for(lambda: not telemetry.alive)
    assert unknowns(None) == ["telemetry says nothing"]


def test_the_process_ends_with_its_reader(board: FakeBoard) -> None:
    telemetry = Telemetry(board.root)
    wait_for(lambda: (window := telemetry.window()) and window.tegrastats == "ok")
    children = Path(f"/proc/{telemetry.pid}/task/{telemetry.pid}/children").read_text().split()
    telemetry.close()
    telemetry.close()
    assert not telemetry.alive
    assert children
    wait_for(lambda: not any(Path(f"/proc/{child}/exe").exists() for child in children))


def _window(**changes: Any) -> Window:
    good = {"samples": 20, "seconds": 1.0, "board": True, "temperatures_c": {"tj": 50.0}, "clocks_mhz": {"gpu": (600.0, 600.0)},
            "events": {"oc1": 0, "oc2": 0, "oc3": 0}, "power_modes": ["25W"], "swap_ins": 0}
    return Window(**{**good, **changes})


@pytest.mark.parametrize(("changes", "reason"), [
    ({"events": {"oc1": 0, "oc2": 0, "oc3": 12}}, "oc3 (instantaneous over-current): 12 events"),
    ({"hot": {"tj": (96.5, 95.0)}}, "tj reached 96.5 °C, the board slows itself down at 95.0 °C"),
    ({"slowing": {"cpufreq-cpu0.1": 2}}, "cooling by cpufreq-cpu0.1 was on, state 2"),
    ({"pushed_down": {"gpu": (200.0, 306.0)}}, "gpu fell to 200 MHz, below its floor of 306 MHz"),
    ({"ceilings_mhz": {"gpu": (408.0, 918.0)}}, "the ceiling of gpu moved between 408 and 918 MHz"),
    ({"swap_ins": 3}, "3 pages came back from swap"),
    ({"power_modes": ["25W", "15W"]}, "the power mode changed: 25W → 15W"),
])
def test_every_taint(changes: dict[str, Any], reason: str) -> None:
    assert taints(_window(**changes)) == [reason]


@pytest.mark.parametrize(("changes", "reason"), [
    ({"temperatures_c": {}}, "temperatures are unknown"),
    ({"clocks_mhz": {}}, "clocks are unknown"),
    ({"events": {"oc1": 0}}, "over-current counters are unknown: oc2, oc3"),
    ({"power_modes": []}, "the power mode is unknown"),
    ({"swap_ins": None}, "swap-ins are unknown"),
    ({"longest_gap_ms": 1500.0}, "telemetry did not look for 1500 ms"),
    ({"samples": 1}, "telemetry says nothing"),
])
def test_every_missing_fact(changes: dict[str, Any], reason: str) -> None:
    assert unknowns(_window(**changes)) == [reason]
    assert unknowns(_window()) == taints(_window()) == []


def test_a_pc_needs_no_board_facts(tmp_path: Path) -> None:
    with Telemetry(pc(tmp_path / "pc").root) as telemetry:
        telemetry.begin()
        window = telemetry.end()
    assert window is not None
    assert not window.board
    assert (taints(window), unknowns(window)) == ([], [])


def _moment(at_s: float, **more: Any) -> dict[str, Any]:
    return Snapshot(at_ns=int(at_s * 1e9), **more).to_json()


def test_hysteresis() -> None:
    judge = Judge(cool_after_s=5.0, hysteresis_c=3.0)
    hot = {"hot": {"tj-thermal": (95.2, 95.0)}, "margin_c": -0.2}
    assert judge.take(_moment(0, margin_c=20.0)) == []
    assert [event.kind for event in judge.take(_moment(1, **hot))] == [THROTTLED]
    assert judge.take(_moment(2, **hot)) == [], "once"
    assert judge.take(_moment(6, margin_c=1.0)) == []
    assert judge.take(_moment(8, margin_c=1.0)) == [], "long enough, not cool enough"
    assert judge.take(_moment(9, margin_c=2.9)) == []
    assert [event.kind for event in judge.take(_moment(10, margin_c=3.1))] == [COOL]
    assert judge.take(_moment(11, margin_c=3.1)) == []


def test_counters_that_stand_still_are_no_throttling() -> None:
    judge = Judge(cool_after_s=1.0)
    assert judge.take(_moment(0, events={"oc3": 27390})) == [], "since the start of the board, not now"
    found = judge.take(_moment(1, events={"oc3": 27400}))
    assert [(event.kind, event.detail) for event in found] == [(THROTTLED, "oc3 (instantaneous over-current): 10 events")]
    assert [event.kind for event in judge.take(_moment(3, events={"oc3": 27400}))] == [COOL]


def test_an_accumulator_of_nothing_knows_nothing() -> None:
    total = Accumulator(board=True)
    total.add(Snapshot(at_ns=0))
    total.add(Snapshot(at_ns=10**8))
    window = total.window
    assert (window.swap_ins, window.used_delta_mib, window.gpu_load_percent, window.events) == (None, None, None, {})
    assert window.rate_hz == 10.0
