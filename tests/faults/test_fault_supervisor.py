"""Faults that only another process survives: endless and uninterruptible runs, crashes, crash loops, memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fmdeploy.runtime.frame import Reason
from fmdeploy.runtime.state import Policy, State
from fmdeploy.runtime.supervisor.restarts import Pauses
from fmdeploy.runtime.supervisor.supervised import SupervisedRuntime
from support.fdti import Fdti
from support.runtimes import frame
from support.supervised import (
    HARD_MS,
    PERIOD_MS,
    first_valid,
    fresh,
    is_right,
    poisoned,
    ready_workers,
    supervised,
    wait_for,
    with_standby,
    write_models,
)

SLACK_MS = 250.0  # of a busy machine, on top of a bound


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("faulty")
    write_models(made)
    return made


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[SupervisedRuntime]:
    """One runtime with a standby for the tests that leave it healthy; losses never latch it."""
    with supervised(folder, policy=Policy(max_restarts=1000), pauses=Pauses(next_ms=0.0)) as made:
        yield made


@pytest.fixture
def healthy(shared: SupervisedRuntime) -> SupervisedRuntime:
    with_standby(shared)
    first_valid(shared)
    return shared


def lose(runtime: SupervisedRuntime, fault: str) -> tuple[float, list[str], list[Reason]]:
    """Feed one poisoned frame; return what it took, its details and its reasons. It must not be valid."""
    start = time.perf_counter()
    found = runtime.infer(poisoned(fault))
    took_ms = 1e3 * (time.perf_counter() - start)
    assert not found.valid
    assert not found.outputs
    return took_ms, [finding.detail for finding in found.findings], list(found.reasons)


def test_F3_endless_loop_ends_by_request_and_the_worker_lives(folder: Path, fdti: Fdti) -> None:
    with supervised(folder, terminate_ms=150.0, hard_deadline_ms=3000.0, standby=False) as runtime:
        pid = ready_workers(runtime)[0].pid
        took_ms, details, reasons = lose(runtime, "loop")
        assert reasons[0] is Reason.BACKEND_ERROR
        assert "terminate" in details[0].lower()
        assert took_ms < 1500
        after = runtime.infer(frame(3))
        assert is_right(after.require_valid(), 3)
        assert ready_workers(runtime)[0].pid == pid
        fdti.report(took_ms, "an endless ONNX loop, ended by RunOptions.terminate")


def test_F3_endless_loop_without_terminate_is_killed(healthy: SupervisedRuntime, fdti: Fdti) -> None:
    took_ms, _, reasons = lose(healthy, "loop")
    assert reasons[:2] == [Reason.LATE, Reason.WORKER_LOST]
    assert HARD_MS - 5 < took_ms < HARD_MS + SLACK_MS
    fdti.report(took_ms, "an endless ONNX loop, hard deadline")
    assert first_valid(healthy)[0] < PERIOD_MS


def test_F3_control_a_slow_run_below_the_limit_is_not_ended(folder: Path) -> None:
    with supervised(folder, terminate_ms=500.0, hard_deadline_ms=3000.0, standby=False) as runtime:
        assert runtime.infer(poisoned("slow")).valid


@pytest.mark.parametrize("fault", ["matmul", "c_sleep"])
def test_F4_uninterruptible_operation(healthy: SupervisedRuntime, fault: str, fdti: Fdti) -> None:
    """One node that runs for seconds, and a C call that keeps the interpreter: only SIGKILL helps."""
    pid = ready_workers(healthy)[0].pid
    took_ms, _, reasons = lose(healthy, fault)
    assert reasons[:2] == [Reason.LATE, Reason.WORKER_LOST]
    assert HARD_MS - 5 < took_ms < HARD_MS + SLACK_MS
    fdti.report(took_ms, f"{fault}, hard deadline {HARD_MS:g} ms")
    wait_ms, before = first_valid(healthy)
    assert wait_ms < PERIOD_MS, before
    assert wait_for(lambda: not Path(f"/proc/{pid}").exists(), 5.0)
    print(f"F4 {fault}: first valid frame {wait_ms:.1f} ms after detection")


def test_F4_terminate_alone_would_not_help(folder: Path) -> None:
    """The positive control of the SIGKILL: the same operation with a request to end it."""
    with supervised(folder, terminate_ms=600.0, hard_deadline_ms=1800.0, standby=False) as runtime:
        took_ms, _, reasons = lose(runtime, "matmul")
    assert Reason.LATE in reasons
    assert took_ms > 1700


def test_F4_control_a_run_within_the_deadline_kills_nobody(healthy: SupervisedRuntime) -> None:
    losses = healthy.fleet.num_losses
    assert healthy.infer(poisoned("slow")).valid
    assert healthy.fleet.num_losses == losses


@pytest.mark.parametrize(("fault", "named"), [("abort", "SIGABRT"), ("segv", "SIGSEGV"), ("exit", "exit code 7")])
def test_F6_backend_crash(healthy: SupervisedRuntime, fault: str, named: str, fdti: Fdti) -> None:
    took_ms, details, reasons = lose(healthy, fault)
    assert reasons[0] is Reason.WORKER_LOST
    assert named in details[0]
    assert took_ms < PERIOD_MS
    fdti.report(took_ms, f"crash by {named}")
    wait_ms, before = first_valid(healthy)
    assert wait_ms < PERIOD_MS, before
    print(f"F6 {fault}: first valid frame {wait_ms:.1f} ms after detection")
    start = time.perf_counter()
    with_standby(healthy)
    print(f"F6 {fault}: the primary is back after {time.perf_counter() - start:.2f} s")
    assert time.perf_counter() - start < 5.0
    assert first_valid(healthy)[1] == []


def test_F6_without_a_standby_the_restart_takes_seconds(folder: Path, fdti: Fdti) -> None:
    with supervised(folder, standby=False) as runtime:
        took_ms, _, _ = lose(runtime, "abort")
        fdti.report(took_ms, "crash, no standby")
        wait_ms, before = first_valid(runtime)
        assert wait_ms < 5000
        assert all(Reason.WORKER_LOST in found.reasons for found in before)
        print(f"F6: {wait_ms:.0f} ms without valid frames, no standby")


def test_F6_killed_between_two_frames(healthy: SupervisedRuntime, fdti: Fdti) -> None:
    worker = healthy.fleet.serving()
    assert worker is not None
    with fdti.detecting("SIGKILL of an idle worker"):
        os.kill(worker.pid, signal.SIGKILL)
        assert wait_for(lambda: worker.lost)
    assert "SIGKILL" in worker.lost
    wait_ms, before = first_valid(healthy)
    assert before == []  # the standby took over before a frame could meet the loss
    assert wait_ms < PERIOD_MS


def test_F6_a_device_that_is_lost_ends_the_worker(healthy: SupervisedRuntime, fdti: Fdti) -> None:
    """A sticky device error: the worker says so, exits with a code of its own and is replaced."""
    worker = healthy.fleet.serving()
    assert worker is not None
    took_ms, _, reasons = lose(healthy, "device")
    assert Reason.DEVICE_LOST in reasons
    fdti.report(took_ms, "a device that fails every call")
    assert wait_for(lambda: "exit code 75" in worker.lost), worker.lost
    assert first_valid(healthy)[0] < 5000


def test_F6_control_a_backend_that_raises_kills_nobody(healthy: SupervisedRuntime) -> None:
    losses = healthy.fleet.num_losses
    assert lose(healthy, "raise")[2] == [Reason.BACKEND_ERROR]
    assert lose(healthy, "nan")[2] == [Reason.NOT_FINITE_OUTPUT]
    assert is_right(healthy.infer(frame(1)).require_valid(), 1)
    assert healthy.fleet.num_losses == losses


def test_F8_crash_loop_latches(tmp_path: Path, fdti: Fdti) -> None:
    pauses = Pauses(next_ms=20.0)
    with supervised(tmp_path, standby=False, pauses=pauses, policy=Policy(max_restarts=3), events=tmp_path / "log") as runtime:
        assert is_right(runtime.infer(frame(0)).require_valid(), 0)
        (tmp_path / "crash").touch()  # from now on no worker survives its start
        with fdti.detecting("from the first crash to the latch, 3 restarts"):
            worker = ready_workers(runtime)[0]
            os.kill(worker.pid, signal.SIGKILL)
            assert wait_for(lambda: runtime.publisher.state is State.SAFE_OUTPUT, 30.0)
        started = (tmp_path / "log").read_text().count('"started"')
        assert started == 4  # the first one and three restarts
        for seed in range(5):
            found = runtime.infer(frame(seed))
            assert Reason.LATCHED in found.reasons
            assert not found.valid
            assert not found.outputs
        (tmp_path / "crash").unlink()
        assert not wait_for(lambda: runtime.publisher.status.takes_frames, 1.0)  # it does not flap
        assert (tmp_path / "log").read_text().count('"started"') == started
        runtime.reset()
        assert runtime.wait_ready(20.0)
        first_valid(runtime)


def test_F8_control_a_single_crash_does_not_latch(tmp_path: Path) -> None:
    with supervised(tmp_path, standby=False) as runtime:
        os.kill(ready_workers(runtime)[0].pid, signal.SIGKILL)
        first_valid(runtime)
        assert runtime.health().counters["restarts"] == 1


def test_F11_starvation_is_counted_and_never_valid(tmp_path: Path, fdti: Fdti) -> None:
    """A worker that gets no CPU time, as when others take it all: stopped for a while, then let go again."""
    with supervised(None, standby=False, deadline_ms=60.0, hard_deadline_ms=5000.0) as runtime:
        pid = ready_workers(runtime)[0].pid
        assert runtime.infer(fresh()).valid or runtime.infer(fresh()).valid
        missed = runtime.health().counters["missed"]
        for seed in range(3):
            os.kill(pid, signal.SIGSTOP)
            child = subprocess.Popen(["sh", "-c", f"sleep 0.15; kill -CONT {pid}"])  # while this process waits for it
            start = time.perf_counter()
            found = runtime.infer(frame(seed))
            took_ms = 1e3 * (time.perf_counter() - start)
            child.wait()
            assert not found.valid
            assert not found.outputs
            assert Reason.LATE in found.reasons or Reason.DROPPED in found.reasons
        fdti.report(took_ms, "a worker without CPU time for 150 ms, deadline 60 ms")
        assert runtime.health().counters["missed"] > missed
        assert runtime.health().state == "DEGRADED"


def test_F11_spinners_on_every_core() -> None:
    """However long frames take: what is late is counted and invalid, what is valid is in time."""
    with supervised(None, standby=False, deadline_ms=4.0, hard_deadline_ms=5000.0) as runtime:
        spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3 * (os.cpu_count() or 1))]
        try:
            found = [runtime.infer(frame(seed)) for seed in range(60)]
        finally:
            for spinner in spinners:
                spinner.kill()
                spinner.wait()
        missed = runtime.health().counters["missed"]
    late = [one for one in found if one.age_ms > 4.0]
    assert bool(missed) == bool([one for one in late if Reason.LATE in one.reasons])
    assert not any(one.valid or (one.outputs and one.mode != "D3") for one in late)  # D3 holds an older result
    assert all(is_right(one, seed) for seed, one in enumerate(found) if one.valid)
    print(f"F11: {len(late)} of {len(found)} late under {len(spinners)} spinners")


def test_F11_control_with_time_nothing_is_missed() -> None:
    with supervised(None, standby=False, deadline_ms=5000.0) as runtime:
        assert all(is_right(runtime.infer(frame(seed)).require_valid(), seed) for seed in range(10))
        assert runtime.health().counters["missed"] == 0


def test_F11_a_silent_worker_is_killed(healthy: SupervisedRuntime, fdti: Fdti) -> None:
    """Stopped between two frames: only its heartbeat tells."""
    worker = healthy.fleet.serving()
    assert worker is not None
    with fdti.detecting("an idle worker that was stopped, silent_ms 1000"):
        os.kill(worker.pid, signal.SIGSTOP)
        assert wait_for(lambda: worker.lost)
    assert "no heartbeat" in worker.lost
    first_valid(healthy)


def test_F18_allocation_failure_is_one_bad_frame(folder: Path, fdti: Fdti) -> None:
    """A limit on the address space, and an operation that wants 14 GB: one error, no abort."""
    with supervised(folder, standby=False, address_space_mib=6144, hard_deadline_ms=5000.0) as runtime:
        pid = ready_workers(runtime)[0].pid
        took_ms, details, reasons = lose(runtime, "huge")
        assert reasons[0] is Reason.BACKEND_ERROR
        assert "alloc" in details[0].lower()
        fdti.report(took_ms, "an allocation beyond RLIMIT_AS")
        assert is_right(runtime.infer(frame(2)).require_valid(), 2)
        assert ready_workers(runtime)[0].pid == pid


def test_F18_control_the_limit_alone_changes_nothing(folder: Path) -> None:
    with supervised(folder, standby=False, address_space_mib=6144) as runtime:
        assert is_right(runtime.infer(frame(2)).require_valid(), 2)
