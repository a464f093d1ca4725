"""What a server hears of its board, and tells its service manager: throttling, the watchdog, lost devices."""

from __future__ import annotations

import asyncio
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fmdeploy.arrays import Array, Arrays
from fmdeploy.errors import ConfigError, FmdeployError, InputError
from fmdeploy.runtime import Runtime
from fmdeploy.runtime.backends.cuda import CudaLostError
from fmdeploy.runtime.backends.protocol import DeviceLostError, close
from fmdeploy.runtime.frame import Reason
from fmdeploy.runtime.health import PerceptionRuntime
from fmdeploy.runtime.serve.address import listen
from fmdeploy.runtime.serve.board import BoardWatch
from fmdeploy.runtime.serve.config import ServeConfig
from fmdeploy.runtime.serve.metrics import Metrics
from fmdeploy.runtime.serve.station import Station
from fmdeploy.runtime.state import EventKind
from fmdeploy.runtime.supervisor.supervised import SupervisedRuntime
from support.fakeboard import orin_nano_jp62, pc
from support.runtimes import frame, runtime, toy_bundle
from support.servers import serving
from support.supervised import supervised
from support.waiting import wait_for


def test_a_hot_board_is_mode_d1_for_whichever_model_serves(tmp_path: Path) -> None:
    board = orin_nano_jp62(tmp_path)
    with runtime() as first, runtime() as second:
        serving_now: list[PerceptionRuntime] = [first]
        watch = BoardWatch(lambda: serving_now[0], tmp_path)
        assert watch.watched
        watch.begin()
        try:
            assert first.infer(frame(0)).state == "ACTIVE"
            board.tj(96.5)
            wait_for(lambda: first.health().mode == "D1")
            found = first.infer(frame(1))
            assert (found.valid, found.mode, found.reasons) == (True, "D1", (Reason.THROTTLED,))
            assert "tj" in found.findings[0].detail
            assert first.infer(frame(2)).reasons[0] is Reason.DROPPED, "at the reduced rate"
            serving_now[0] = second  # a reload: the new model is told, too
            wait_for(lambda: second.health().mode == "D1")
            board.tj(50.0)
            wait_for(lambda: not any(held.lasting for held in second.publisher.status.held))
        finally:
            watch.close()


def test_a_workstation_is_not_watched(tmp_path: Path) -> None:
    pc(tmp_path)
    watch = BoardWatch(lambda: None, tmp_path)
    watch.begin()
    assert not watch.watched
    watch.close()


def test_both_runtimes_take_notes_of_the_machine_and_of_nothing_else() -> None:
    with runtime() as embedded, supervised(None, standby=False, tiers=("fp32",)) as other:
        for one in (embedded, other):
            one.note(EventKind.THROTTLED, "hot")
            found = one.infer(frame(0))
            assert (found.mode, found.reasons) == ("D1", (Reason.THROTTLED,))
            one.note(EventKind.COOL)
            for kind in (EventKind.SELF_TEST_PASSED, EventKind.RESET, EventKind.MONITOR_BACK, EventKind.FRAME_GOOD):
                with pytest.raises(FmdeployError, match="nothing that others may tell"):
                    one.note(kind)


# The service manager and an embedded runtime


def heard(manager: socket.socket) -> str:
    return manager.recv(4096).decode()


def test_an_idle_service_without_a_supervisor_kicks_the_watchdog(tmp_path: Path) -> None:
    """Type=notify and WatchdogSec must not kill a server to which nobody sends frames."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1500000"}
        with serving(tmp_path, "--no-supervisor", "--tiers", "fp32", env=env) as server:
            assert heard(manager).startswith("READY=1")
            times = []
            for _ in range(3):
                assert heard(manager) == "WATCHDOG=1"
                times.append(time.monotonic())
            assert server.infer(frame(0)).status == 200
            assert server.stop() == 0
        assert max(b - a for a, b in zip(times, times[1:], strict=False)) < 1.5, times
        rest = []
        manager.setblocking(False)
        try:
            while True:
                rest.append(heard(manager))
        except BlockingIOError:
            pass
        assert rest[-1] == "STOPPING=1"


def test_a_stuck_embedded_run_stops_the_kicks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "300000")
        monkeypatch.delenv("WATCHDOG_PID", raising=False)

        async def run() -> None:
            station = Station(ServeConfig(bundle=toy_bundle(), tiers=("fp32",), supervisor=False), Metrics())
            await station.load()
            target: Any = station.runtime
            assert heard(manager).startswith("READY=1")
            assert heard(manager) == "WATCHDOG=1"
            with target._lock:  # as a run that never returns would hold it
                time.sleep(0.5)
                manager.setblocking(False)
                while True:  # what was kicked before
                    try:
                        heard(manager)
                    except BlockingIOError:
                        break
                time.sleep(0.6)
                with pytest.raises(BlockingIOError):
                    heard(manager)
                manager.settimeout(60)
            assert heard(manager) == "WATCHDOG=1"
            assert station.close(30)

        asyncio.run(run())


def test_a_lost_device_is_neither_a_bug_nor_a_missing_part() -> None:
    """jetson/fmdeploy.service does not start a server again that ended with 2 or 3."""
    unit = (Path(__file__).resolve().parents[3] / "jetson/fmdeploy.service").read_text()
    kept_down = next(line for line in unit.splitlines() if line.startswith("RestartPreventExitStatus="))
    assert str(DeviceLostError.exit_code) not in kept_down.partition("=")[2].split()
    assert DeviceLostError.exit_code not in (0, 4)


def test_a_device_that_is_lost_in_its_trial_leaves_the_other_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Giving memory back fails on a lost device, too; the CPU must take over all the same."""

    class Lost:
        provider, threads = "a GPU", 1

        def run(self, feeds: Arrays) -> list[Array]:
            raise CudaLostError("cudaGraphLaunch failed with CUDA error 700", code=700)

        def close(self) -> None:
            raise CudaLostError("cudaFree failed with CUDA error 700", code=700)

    from fmdeploy.runtime import tiers
    from fmdeploy.runtime.loading import load_backend as load

    monkeypatch.setattr(tiers, "load_backend", lambda bundle, tier, threads, terms:
                        (Lost(), "") if tier.name == "int8-cpu" else load(bundle, tier, threads, terms))
    with Runtime(toy_bundle(), tiers=("int8-cpu", "fp32")) as target:
        assert target.tier == "fp32"
        assert "error 700" in target.reports[0].reason
        assert target.infer(frame(0)).valid
    close(Lost())


def test_an_idle_self_test_runs_one_sample_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All samples of a slow model would take longer than the hard deadline, and the worker would be killed for it."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    monkeypatch.setenv("WATCHDOG_USEC", "150000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    with supervised(None, standby=False, tiers=("fp32",)) as target:
        worker = target.fleet.serving()
        assert worker is not None
        asked: list[dict[str, Any]] = []
        ask = worker.ask

        def noted(question: dict[str, Any], until_ns: int) -> dict[str, Any]:
            asked.append(question)
            return ask(question, until_ns)

        monkeypatch.setattr(worker, "ask", noted)
        wait_for(lambda: len(asked) >= 3)
        numbers = [question["sample"] for question in asked[:3]]
        assert numbers == list(range(numbers[0], numbers[0] + 3))
        assert target.infer(frame(0)).valid


def test_a_frame_that_waited_for_others_does_not_cost_the_worker(tmp_path: Path) -> None:
    """What is left of its hard deadline may be too little for a healthy run; three such losses would latch."""
    with supervised(None, standby=False, tiers=("fp32",), hard_deadline_ms=400.0) as target:
        for held_s, reasons in ((0.05, ()), (0.35, (Reason.DROPPED,))):
            with target._lock, ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(target.infer, frame(int(1000 * held_s)))
                time.sleep(held_s)
                target._lock.release()
                try:
                    assert waiting.result(30).reasons == reasons
                finally:
                    target._lock.acquire()
        assert target.health().counters["losses"] == 0


def test_files_that_vanish_keep_lost_workers_down_until_they_are_back(tmp_path: Path) -> None:
    root = shutil.copytree(toy_bundle(), tmp_path / "bundle")
    with SupervisedRuntime(root, tiers=("fp32",), standby=False) as target:
        assert target.infer(frame(0)).valid
        root.rename(tmp_path / "elsewhere")
        assert target.infer(frame(1)).valid, "what was loaded serves on"
        (worker,) = target.fleet.workers()
        worker.kill()
        wait_for(lambda: target.health().state == "SAFE_OUTPUT")
        assert any(str(root) in reason for reason in target.health().reasons), target.health().reasons
        assert not target.infer(frame(2)).valid
        (tmp_path / "elsewhere").rename(root)
        target.reset()
        wait_for(lambda: target.infer(frame(3)).valid)


def test_a_worker_that_was_being_started_at_a_latch_does_not_stand_in_the_way_of_the_reset(
    monkeypatch: pytest.MonkeyPatch) -> None:
    with supervised(None, standby=False, tiers=("fp32",)) as target:
        fleet, spawn = target.fleet, target.fleet._spawn
        latched = threading.Event()

        def latch_meanwhile(post: Any) -> Any:
            worker = spawn(post)
            if not latched.is_set():
                latched.set()
                fleet.dismiss("latched")
            return worker

        monkeypatch.setattr(fleet, "_spawn", latch_meanwhile)
        (first,) = fleet.workers()
        first.kill()
        assert latched.wait(60)
        wait_for(lambda: fleet.workers() == [])
        fleet.plan_start()
        wait_for(lambda: target.infer(frame(1)).valid)


# Addresses


def test_a_localhost_that_is_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """/etc/hosts and name servers may say anything."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.7", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
    with pytest.raises(ConfigError, match="other machines"):
        listen("localhost:0", None, allow_remote=False)


def test_a_host_that_is_no_name_is_refused() -> None:
    with pytest.raises(InputError, match="cannot listen"):
        listen("a" * 70 + "é:0", None, allow_remote=True)
