"""Restarts, memory, systemd, the channel and the end of a worker: each part alone, with what it really talks to."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmdeploy.errors import ArtifactError, FmdeployError, FrameError, ModelFileError
from fmdeploy.runtime.bundle import open_bundle
from fmdeploy.runtime.frame import Finding, Reason
from fmdeploy.runtime.guards.config import GuardConfig
from fmdeploy.runtime.inference import Result
from fmdeploy.runtime.loading import Terms
from fmdeploy.runtime.supervisor import notes
from fmdeploy.runtime.supervisor.channel import Channel, make_memory
from fmdeploy.runtime.supervisor.notes import Setup
from fmdeploy.runtime.supervisor.notify import Notifier
from fmdeploy.runtime.supervisor.restarts import Pauses, Restarts
from fmdeploy.runtime.supervisor.supervised import SupervisedRuntime
from fmdeploy.runtime.supervisor.watch import Floor, Growth, MemoryPolicy, rss_mib
from support.bundles import make_bundle
from support.runtimes import frame, toy_bundle
from support.supervised import fresh, is_right, ready_workers, supervised, wait_for

MS = 1_000_000


def test_pauses_double_up_to_the_longest() -> None:
    restarts = Restarts(10, 60_000, Pauses(0.0, 100.0, 500.0))
    pauses = []
    for number in range(6):
        restarts.lost(number * MS)
        pauses.append((restarts.next_start_ns(0)) // MS)
    assert pauses == [0, 100, 200, 400, 500, 500]


def test_old_losses_are_forgotten() -> None:
    restarts = Restarts(1, 1000, Pauses())
    restarts.lost(0)
    restarts.lost(1_500 * MS)
    assert not restarts.exhausted
    restarts.lost(1_600 * MS)
    assert restarts.exhausted
    restarts.forget()
    assert not restarts.exhausted
    assert restarts.next_start_ns(7) == 7


def meminfo(root: Path, mib: int) -> None:
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/meminfo").write_text(f"MemAvailable: {mib * 1024} kB\n")


def test_the_floor_has_hysteresis(tmp_path: Path) -> None:
    floor, found = Floor(MemoryPolicy(floor_mib=100, root=tmp_path)), []
    for mib in (200, 101, 99, 110, 124, 126, 110, 101):
        meminfo(tmp_path, mib)
        found.append(floor.look())
    assert found == [False, False, True, True, True, False, False, False]


def test_unknown_memory_is_not_low_and_not_a_number(tmp_path: Path) -> None:
    floor = Floor(MemoryPolicy(floor_mib=100, root=tmp_path))
    assert not floor.look()
    assert floor.available_mib is None


def test_growth_counts_from_a_warm_process() -> None:
    growth = Growth(MemoryPolicy(growth_mib=40, warm_up_runs=5), os.getpid())
    assert not growth.look(completed=4)
    assert growth.baseline_mib is None
    assert not growth.look(completed=5)
    held = np.ones(400 << 17)  # 400 MiB, touched: other tests' memory may be given back meanwhile
    assert growth.look(completed=6)
    del held
    assert rss_mib(2**22 + 1) is None


class Systemd:
    """A datagram socket as systemd has it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, address: str, **env: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address.replace("@", "\0"))
        self.socket.settimeout(5.0)
        self.environ = {"NOTIFY_SOCKET": address, **env}
        for name, value in self.environ.items():
            monkeypatch.setenv(name, value)

    def heard(self) -> list[str]:
        found: list[str] = []
        self.socket.setblocking(False)
        while True:
            try:
                found.append(self.socket.recv(1000).decode())
            except BlockingIOError:
                return found


@pytest.fixture
def listen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Systemd]]:
    """Makes listeners, and closes them at the end."""
    made: list[Systemd] = []

    def make(address: str = str(tmp_path / "notify"), **env: str) -> Systemd:
        made.append(Systemd(monkeypatch, address, **env))
        return made[-1]

    yield make
    for systemd in made:
        systemd.socket.close()


def test_what_systemd_hears(listen: Callable[..., Systemd]) -> None:
    systemd = listen(WATCHDOG_USEC="1000000", WATCHDOG_PID=str(os.getpid()))
    notifier = Notifier(systemd.environ)
    notifier.ready("on\nint8-cpu")
    notifier.progress()
    notifier.progress()  # not due yet
    notifier.status("DEGRADED")
    notifier.stopping()
    notifier.close()
    notifier.progress()
    assert systemd.heard() == ["READY=1\nSTATUS=on int8-cpu", "WATCHDOG=1", "STATUS=DEGRADED", "STOPPING=1"]
    assert notifier.num_errors == 0


def test_an_abstract_socket(listen: Callable[..., Systemd], tmp_path: Path) -> None:
    systemd = listen(f"@fmdeploy-{os.getpid()}-{tmp_path.name}")
    notifier = Notifier(systemd.environ)
    notifier.ready("x")
    notifier.close()
    assert systemd.heard() == ["READY=1\nSTATUS=x"]


@pytest.mark.parametrize(("environ", "interval_s"), [
    ({}, 0.0), ({"WATCHDOG_USEC": "3000000"}, 3.0), ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, 0.0),
    ({"WATCHDOG_USEC": "x"}, 0.0), ({"WATCHDOG_USEC": "-3"}, 0.0), ({"WATCHDOG_USEC": "0"}, 0.0),
])
def test_watchdog_variables(environ: dict[str, str], interval_s: float) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": "/nowhere/notify", **environ})
    assert notifier.interval_ns == interval_s * 1e9
    notifier.close()
    assert Notifier(environ).interval_ns == 0  # no socket, no watchdog


def test_a_listener_whose_queue_is_full_costs_nothing(listen: Callable[..., Systemd]) -> None:
    systemd = listen()
    notifier, start = Notifier(systemd.environ), time.monotonic()
    for _ in range(2000):
        notifier.status("x")
    notifier.close()
    assert notifier.num_errors > 0
    assert time.monotonic() - start < 2.0


def test_the_watchdog_hears_of_frames_and_of_idle_self_tests(listen: Callable[..., Systemd]) -> None:
    systemd = listen(WATCHDOG_USEC="600000", WATCHDOG_PID=str(os.getpid()))
    with supervised(None, standby=False) as runtime:
        assert systemd.heard()[0].startswith("READY=1")
        assert runtime.infer(frame(0)).valid
        assert runtime.infer(frame(1)).valid
        assert wait_for(lambda: "WATCHDOG=1" in systemd.heard(), 5.0)
        completed = ready_workers(runtime)[0].channel.heartbeat().completed
        assert wait_for(lambda: ready_workers(runtime)[0].channel.heartbeat().completed >= completed + 2, 10.0)
        assert wait_for(lambda: "WATCHDOG=1" in systemd.heard(), 5.0)  # nobody fed a frame: the golden inputs ran


def test_the_watchdog_hears_nothing_when_no_frame_is_completed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, listen: Callable[..., Systemd]) -> None:
    """Frames are expected and none completes: the service looks as dead as it is."""
    systemd = listen(WATCHDOG_USEC="200000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    with supervised(tmp_path, standby=False) as runtime:
        (tmp_path / "crash").touch()
        os.kill(ready_workers(runtime)[0].pid, 9)
        assert wait_for(lambda: not runtime.infer(fresh()).valid)
        systemd.heard()
        for seed in range(20):
            assert not runtime.infer(frame(seed)).valid
            time.sleep(0.01)
        if runtime.publisher.state.value != "SAFE_OUTPUT":  # the latch is meant to last: only there it is kicked
            assert "WATCHDOG=1" not in systemd.heard()


results = st.builds(
    Result, st.just({}),
    st.lists(st.builds(Finding, st.sampled_from(list(Reason)), st.text(max_size=300)), max_size=20).map(tuple),
    st.text(max_size=20), st.text(max_size=64), st.text(max_size=40),
    st.dictionaries(st.text(max_size=20), st.floats(allow_nan=False), max_size=8), st.booleans(),
)


@given(results)
def test_a_result_comes_back_as_it_was_sent(result: Result) -> None:
    assert notes.decode_result(notes.encode_result(result), {}) == result


def test_any_number_of_findings_fits_a_slot() -> None:
    from fmdeploy.runtime.supervisor.ring import NOTES_BYTES

    findings = tuple(Finding(Reason.NOT_FINITE, "\N{SNOWMAN}" * 5000) for _ in range(500))
    scores = {f"input{n}.distance": 1.23456789e-100 for n in range(40)}
    assert len(notes.encode_result(Result({}, findings, "t", "m", "p", scores))) <= NOTES_BYTES


def test_a_setup_comes_back_as_it_was_sent() -> None:
    setup = Setup("b", "d", ("x", "y"), 2, GuardConfig(frozen_after=3), 1.5, 2.5, 7, Terms(Path("e"), target="orin-nano"))
    assert Setup.decode(setup.encode()) == setup


@given(st.booleans(), st.sets(st.text(max_size=9)))
def test_a_request_comes_back_as_it_was_sent(refused: bool, missing: set[str]) -> None:
    assert notes.decode_request(notes.encode_request(missing, refused)) == (refused, tuple(sorted(missing)))


def test_shared_memory_has_no_name_and_cannot_shrink() -> None:
    io = open_bundle(toy_bundle()).io
    memory = make_memory(io)
    with pytest.raises(PermissionError):
        os.ftruncate(memory, 0)  # under a mapping that would be SIGBUS
    assert "memfd:fmdeploy (deleted)" in os.readlink(f"/proc/self/fd/{memory}")
    one, other = socket.socketpair()
    a, b = Channel(io, memory, one), Channel(io, memory, other)
    os.close(memory)
    assert b.heartbeat() == (0, 0, None)
    a.beat(busy=3, completed=2)
    assert b.heartbeat()[1:] == (2, 3)
    a.close()
    b.close()


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm")), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with supervised(None, standby=False) as runtime:
            os.kill(ready_workers(runtime)[0].pid, 9)
            assert wait_for(lambda: not runtime.infer(fresh()).valid)
    assert (set(os.listdir("/dev/shm")), len(os.listdir("/proc/self/fd"))) == before


def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"no tier passes.*no model\.nope\.onnx"):
        supervised(None, tiers=("nope",))
    with pytest.raises(ArtifactError):
        SupervisedRuntime(tmp_path / "missing")
    (tmp_path / "crash").touch()
    with pytest.raises(FmdeployError, match="SIGABRT"):
        supervised(tmp_path)


def test_a_bundle_that_was_replaced_is_not_what_a_new_worker_runs(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle").root
    other = make_bundle(tmp_path / "other", width=4).root
    with SupervisedRuntime(bundle, tiers=("fp32",), standby=False) as runtime:
        bundle.rename(tmp_path / "old")
        other.rename(bundle)
        os.kill(ready_workers(runtime)[0].pid, 9)
        assert wait_for(lambda: "replaced after the supervisor" in str(runtime.health().reasons), 10.0)
        assert not runtime.infer(frame(0)).valid


def test_structure_is_refused_before_anything_is_sent() -> None:
    with supervised(None, standby=False) as runtime:
        with pytest.raises(FrameError):
            runtime.infer({"lidar": np.zeros(3)})
        assert is_right(runtime.infer(frame(4)).require_valid(), 4)


def test_frames_are_the_callers_own() -> None:
    """Results are copies: later frames do not write into earlier ones, and inputs may be used again at once."""
    with supervised(None, standby=False) as runtime:
        mine = frame(0)
        kept = [runtime.infer(frame(seed)) for seed in range(8)]
        first = runtime.infer(mine)
        mine["lidar"][:] = 1.0
        assert is_right(first, 0)
        assert all(is_right(one, seed) for seed, one in enumerate(kept))
