"""Faults around a supervised service: signals, memory, disks, a lost monitor, listeners that left, odd environments."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fmdeploy.runtime.frame import Reason
from fmdeploy.runtime.supervisor.watch import MemoryPolicy
from support import supervised_driver
from support.fdti import Fdti
from support.runtimes import frame, toy_bundle
from support.supervised import fresh, is_right, poisoned, ready_workers, supervised, wait_for, with_standby

TESTS = Path(__file__).resolve().parents[1]
SOURCE = TESTS.parent / "src"


@contextmanager
def service(prefix: tuple[str, ...] = (), env: dict[str, str] | None = None, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A running service, ready; killed at the end if it still lives."""
    options = {"bundle": str(toy_bundle()), **options}
    command = [*prefix, sys.executable, str(Path(supervised_driver.__file__)), json.dumps(options)]
    base = {**os.environ} if env is None else env
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**base, "PYTHONPATH": f"{SOURCE}:{TESTS}"})
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_line(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        assert process.stderr is not None
        pytest.fail(process.stderr.read())
    found: dict[str, Any] = json.loads(line)
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# F9: stop


@pytest.mark.parametrize("feed", [False, True], ids=["idle", "busy"])
def test_F9_sigterm_drains_and_exits_0(tmp_path: Path, feed: bool, fdti: Fdti) -> None:
    with service(feed=feed, events=str(tmp_path / "events")) as process:
        started = read_line(process)
        time.sleep(0.2)
        with fdti.detecting(f"SIGTERM to exit, {'busy' if feed else 'idle'}"):
            process.send_signal(signal.SIGTERM)
            assert process.wait(5.0) == 0
        record = read_line(process)["shutdown"]
    assert record["drained"]
    # A frame that came while it drained is refused, not lost; all others were answered.
    assert 0 <= record["counters"]["frames"] - record["counters"]["valid"] <= 2
    assert bool(record["counters"]["frames"]) == feed
    last = json.loads((tmp_path / "events").read_text().splitlines()[-1])
    assert last["event"] == "shutdown"
    assert last["counters"] == record["counters"]
    assert not any(is_alive(pid) for pid in started["workers"])


def test_F9_sigterm_during_an_endless_run_kills_the_worker_after_the_grace_time(tmp_path: Path, fdti: Fdti) -> None:
    with service(folder=str(tmp_path), fault="c_sleep", grace_ms=400.0, hard_deadline_ms=60_000.0,
                 events=str(tmp_path / "events")) as process:
        worker = read_line(process)["workers"][0]
        time.sleep(0.2)  # the run is in progress: the first frame is the poisoned one
        with fdti.detecting("SIGTERM during a hung run, grace 400 ms"):
            start = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert process.wait(6.0) == 0
        assert 0.35 < time.monotonic() - start < 4.0
        assert not read_line(process)["shutdown"]["drained"]
    assert not is_alive(worker)
    assert '"shutdown"' in (tmp_path / "events").read_text()


@pytest.mark.parametrize("fault", ["", "c_sleep"], ids=["between frames", "in a C call"])
def test_F9_a_worker_dies_with_its_parent(tmp_path: Path, fault: str, fdti: Fdti) -> None:
    options: dict[str, Any] = {"folder": str(tmp_path), "fault": fault, "hard_deadline_ms": 60_000.0} if fault else {}
    with service(**options) as process:
        worker = read_line(process)["workers"][0]
        time.sleep(0.2)
        assert is_alive(worker)
        with fdti.detecting("SIGKILL of the parent to the end of the worker"):
            process.kill()
            assert wait_for(lambda: not is_alive(worker), 5.0)


def test_F9_control_without_sigterm_it_goes_on() -> None:
    with service() as process:
        worker = read_line(process)["workers"][0]
        time.sleep(0.3)
        assert process.poll() is None
        assert is_alive(worker)


# F19: memory


def write_meminfo(root: Path, mib: int) -> None:
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc" / "meminfo.new").write_text(f"MemTotal: 8000000 kB\nMemFree: 1 kB\nMemAvailable: {mib * 1024} kB\n")
    os.replace(root / "proc" / "meminfo.new", root / "proc" / "meminfo")


def test_F19_memory_floor_degrades_and_starts_nothing(tmp_path: Path, fdti: Fdti) -> None:
    write_meminfo(tmp_path, 4000)
    with with_standby(supervised(None, memory=MemoryPolicy(floor_mib=256, root=tmp_path))) as runtime:
        assert is_right(runtime.infer(frame(0)).require_valid(), 0)
        with fdti.detecting("MemAvailable below the floor"):
            write_meminfo(tmp_path, 100)
            assert wait_for(lambda: Reason.MEMORY_FLOOR in runtime.infer(fresh()).reasons, 5.0)
        found = runtime.infer(frame(2))
        assert (found.state, found.mode) == ("DEGRADED", "D2")
        assert is_right(found.require_valid(), 2)
        assert wait_for(lambda: len(ready_workers(runtime)) == 1, 5.0)  # the standby gives its memory back
        pids = {worker.pid for worker in runtime.fleet.workers()}
        time.sleep(0.5)
        assert {worker.pid for worker in runtime.fleet.workers()} == pids  # and none is started
        write_meminfo(tmp_path, 4000)
        with_standby(runtime)


def test_F19_control_enough_memory_is_not_low(tmp_path: Path) -> None:
    write_meminfo(tmp_path, 300)
    with supervised(None, standby=False, memory=MemoryPolicy(floor_mib=256, root=tmp_path)) as runtime:
        time.sleep(0.7)
        found = runtime.infer(frame(1))
        assert found.valid
        assert not found.findings


def test_F19_a_worker_that_leaks_is_replaced_between_frames(tmp_path: Path, fdti: Fdti) -> None:
    memory = MemoryPolicy(growth_mib=60.0, warm_up_runs=10)
    with supervised(tmp_path, standby=False, memory=memory) as runtime:
        first = ready_workers(runtime)[0].pid
        assert all(runtime.infer(frame(seed)).valid for seed in range(12))
        time.sleep(0.2)  # the monitor takes the baseline
        start, number = time.perf_counter(), 0
        while ready_workers(runtime)[0].pid == first and number < 2000:
            found = runtime.infer(poisoned("leak", number) if number < 4 else frame(number))
            assert found.valid, found.record()
            number += 1
            time.sleep(0.005)
        fdti.report(1e3 * (time.perf_counter() - start), "a leak of 96 MiB to the replaced worker")
        assert ready_workers(runtime)[0].pid != first
        assert wait_for(lambda: not is_alive(first))
        assert runtime.health().counters["losses"] == 0  # planned: no fault, no invalid frame


# F21, F22: disks


@contextmanager
def full_disk(folder: Path) -> Iterator[Path]:
    """A file system without room; /dev/full where mounting is not allowed."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True).returncode:
        yield Path("/dev/full")
        return
    try:
        with (folder / "filler").open("wb", buffering=0) as stream, pytest.raises(OSError, match="No space"):
            stream.writelines(bytes(1 << 16) for _ in range(100))
        yield folder / "events"
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_F21_full_disk_loses_lines_not_frames(tmp_path: Path, fdti: Fdti, monkeypatch: pytest.MonkeyPatch) -> None:
    with full_disk(tmp_path / "full") as events:
        if events.parent != Path("/dev"):
            monkeypatch.setenv("TMPDIR", str(events.parent))  # the workers' temporary files, too
        with fdti.detecting("the first line that is lost"), supervised(None, standby=False, events=events) as runtime:
            assert runtime.health().counters["log_errors"] > 0
        with supervised(None, standby=False, events=events) as runtime:
            assert all(is_right(runtime.infer(frame(seed)).require_valid(), seed) for seed in range(20))
            os.kill(ready_workers(runtime)[0].pid, signal.SIGKILL)
            assert wait_for(lambda: runtime.infer(fresh()).valid)  # restarts need no disk either


def test_F21_control_with_room_no_line_is_lost(tmp_path: Path) -> None:
    with supervised(None, standby=False, events=tmp_path / "events") as runtime:
        assert runtime.infer(frame(0)).valid
        assert runtime.health().counters["log_errors"] == 0
    assert [json.loads(line)["event"] for line in (tmp_path / "events").read_text().splitlines()] == \
        ["started", "ready", "shutdown"]


READ_ONLY = "mount --bind / {root} && mount -o remount,bind,ro {root} && mount -t tmpfs none {root}/tmp && " \
            "mount --rbind /dev {root}/dev && mount --rbind /proc {root}/proc && {needed} && exec chroot {root} \"$@\""
SHOWN = "mkdir -p {root}{path} && mount --bind {path} {root}{path} && mount -o remount,bind,ro {root}{path}"


def read_only(root: Path, *needed: Path) -> str:
    """A shell script that runs its arguments where nothing but /tmp can be written; `needed` may lie below /tmp, too."""
    shown = " && ".join(SHOWN.format(root=root, path=path) for path in needed)
    return READ_ONLY.format(root=root, needed=shown)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts")
def test_F22_read_only_root(tmp_path: Path, fdti: Fdti) -> None:
    root = tmp_path / "root"
    root.mkdir()
    here = Path(__file__).resolve().parents[2]
    script = read_only(root, toy_bundle(), Path(sys.base_prefix), here, Path(sys.prefix))
    prefix = ("unshare", "--mount", "sh", "-c", script, "sh")
    probe = subprocess.run([*prefix, "touch", "/etc/probe"], capture_output=True, text=True)
    assert "Read-only" in probe.stderr, probe.stderr  # the positive control: nothing can be written there
    with fdti.detecting("to the first frames on a read-only root"), \
            service(prefix, frames=True, events="/var/log/fmdeploy-events") as process:
        found = [read_line(process) for _ in range(3)]
    assert sum("tier" in line for line in found) <= 1
    assert all(line["valid"] for line in found if "valid" in line)


def test_F22_control_a_writable_root_gets_its_events(tmp_path: Path) -> None:
    with service(events=str(tmp_path / "events")) as process:
        read_line(process)
        assert (tmp_path / "events").exists()


# F34: the monitor


def test_F34_a_dead_monitor_makes_frames_invalid(fdti: Fdti) -> None:
    with supervised(None, standby=False, unmonitored_ms=400.0) as runtime:
        assert runtime.infer(frame(0)).valid
        with fdti.detecting("the monitor's thread ended"):
            runtime.monitor.stop()
            found = runtime.infer(frame(1))
        assert not found.valid
        assert not found.outputs
        assert Reason.UNMONITORED in found.reasons
        assert Reason.UNMONITORED in runtime.infer(frame(2)).reasons
        runtime.reset()  # the operator has it started again
        assert wait_for(lambda: runtime.infer(fresh()).valid, 10.0)


def test_F34_a_monitor_that_hangs_makes_frames_invalid(fdti: Fdti) -> None:
    let_go, stuck = threading.Event(), threading.Event()

    def hang(now_ns: int) -> None:
        stuck.set()
        let_go.wait(20.0)

    with supervised(None, standby=False, unmonitored_ms=300.0) as runtime:
        assert runtime.infer(frame(0)).valid
        runtime.monitor.fleet.step = hang  # type: ignore[method-assign]
        try:
            assert stuck.wait(5.0)
            with fdti.detecting("the monitor hangs, unmonitored_ms 300"):
                assert wait_for(lambda: not runtime.infer(fresh()).valid, 5.0)
            assert Reason.UNMONITORED in runtime.infer(frame(2)).reasons
        finally:
            del runtime.monitor.fleet.step
            let_go.set()
        assert wait_for(lambda: runtime.infer(fresh()).valid, 10.0)


def test_F34_control_a_watched_runtime_stays_valid() -> None:
    with supervised(None, standby=False, unmonitored_ms=1000.0) as runtime:
        end = time.monotonic() + 1.2
        while time.monotonic() < end:
            found = runtime.infer(fresh())
            assert Reason.UNMONITORED not in found.reasons
            time.sleep(0.02)


# F35: nobody listens


def test_F35_systemd_goes_away(tmp_path: Path, fdti: Fdti, monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket of the service manager closes, then its file goes: frames go on, the failures are counted."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    with supervised(None, standby=False) as runtime:
        assert listener.recv(200).startswith(b"READY=1\n")
        assert runtime.infer(frame(0)).valid
        assert listener.recv(200) == b"WATCHDOG=1"
        with fdti.detecting("a listener that left"):
            listener.close()
            assert wait_for(lambda: runtime.infer(fresh()).valid and runtime.health().counters["notify_errors"] > 0, 5.0)
        (tmp_path / "notify").unlink()
        assert runtime.infer(frame(2)).valid
    assert runtime.health().counters["notify_errors"] > 1


def test_F35_standard_error_is_a_closed_pipe(fdti: Fdti) -> None:
    """Workers inherit it: a warning of a library must not kill anybody."""
    with service(frames=True) as process, fdti.detecting("stderr closed by its reader"):
        assert process.stderr is not None
        process.stderr.close()
        assert read_line(process)
        assert all(line["valid"] for line in (read_line(process) for _ in range(5)) if "valid" in line)
        process.stderr = open(os.devnull)  # noqa: SIM115 - communicate() wants one


def test_F35_control_a_listener_hears_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind("\0fmdeploy-test-" + tmp_path.name + str(os.getpid()))
    listener.settimeout(5.0)
    monkeypatch.setenv("NOTIFY_SOCKET", "@" + str(listener.getsockname()[1:], "ascii"))
    with supervised(None, standby=False) as runtime:
        assert listener.recv(200).startswith(b"READY=1\nSTATUS=")
    assert listener.recv(200) == b"STOPPING=1"
    assert runtime.health().counters["notify_errors"] == 0
    listener.close()


# F38: odd environments


# An unknown user who may read what root may (the interpreter of the tests may lie in root's home), but write nothing.
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all,+dac_read_search",
          "--ambient-caps=-all,+dac_read_search", "--bounding-set=-all,+dac_read_search")


@pytest.mark.skipif(os.geteuid() != 0, reason="changes its user")
@pytest.mark.parametrize("env", [{"LANG": "C", "TZ": "Antarctica/Troll"},
                                 {"LC_ALL": "tr_TR.UTF-8", "TZ": ":nonsense", "HOME": "/nowhere"}], ids=["no home", "odd"])
def test_F38_no_home_odd_locale_and_an_unknown_user(env: dict[str, str], fdti: Fdti) -> None:
    environ = {"PATH": os.environ["PATH"], **env}
    probe = subprocess.run([*NOBODY, "touch", "/probe"], capture_output=True, text=True, env={**environ, "LC_ALL": "C"})
    assert "Permission denied" in probe.stderr, probe.stderr  # the positive control
    before = {path: path.stat().st_mtime_ns for path in (Path("/"), SOURCE.parent, toy_bundle())}
    with fdti.detecting("to the first frames as uid 65534"), service(NOBODY, environ, frames=True) as process:
        lines = [read_line(process) for _ in range(4)]
        assert all(line["valid"] and line["uid"] == 65534 for line in lines if "valid" in line)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5.0) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_F38_control_the_usual_environment() -> None:
    with service(frames=True) as process:
        lines = [read_line(process) for _ in range(4)]
        assert all(line["valid"] for line in lines if "valid" in line)
