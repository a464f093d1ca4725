"""Rows F16, F23, F24, F35 (HTTP), F36, F39 and T14, through real server processes."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmdeploy.arrays import Arrays
from fmdeploy.errors import InputError
from fmdeploy.runtime import open_bundle
from fmdeploy.runtime.serve.address import listen
from support.bundles import fp32_model, make_bundle
from support.fdti import Fdti
from support.runtimes import frame, runtime, toy_bundle
from support.servers import Server, connect, free_port, outputs_of, parameters_of, serving, start
from support.waiting import wait_for

EMBEDDED = ("--no-supervisor", "--tiers", "fp32")
QUEUE = 2
BURST = 100
PERIOD_MS = 100.0


@functools.cache
def slow_bundle() -> Path:
    """A bundle whose model takes some hundredths of a second a frame."""
    folder = Path(tempfile.mkdtemp(prefix="fmdeploy-slow-"))
    return make_bundle(folder / "slow", models={"fp32": fp32_model(16, 512)}).root


@pytest.fixture(scope="module")
def truth() -> dict[int, Arrays]:
    with runtime() as reference:
        return {seed: reference.infer(frame(seed)).require_valid().outputs for seed in range(64)}


def same(found: Arrays, wanted: Arrays) -> bool:
    return found.keys() == wanted.keys() and all(np.array_equal(found[name], wanted[name]) for name in wanted)


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """Results of calls that start together, each in a thread."""
    gate, results = threading.Barrier(len(calls)), [None] * len(calls)

    def run(number: int) -> None:
        gate.wait()
        results[number] = calls[number]()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


# F16: input burst


def burst(server: Server, count: int) -> list[tuple[int, list[str], float]]:
    def one(seed: int) -> tuple[int, list[str], float]:
        begin = time.monotonic()
        answer = server.infer(frame(seed))
        return answer.status, answer.reasons, 1e3 * (time.monotonic() - begin)

    return at_once([functools.partial(one, seed) for seed in range(count)])


def test_F16_burst_drops_the_oldest(fdti: Fdti, tmp_path: Path) -> None:
    with serving(tmp_path, *EMBEDDED, "--queue", str(QUEUE), "--connections", str(2 * BURST), bundle=slow_bundle()) as server:
        before = server.metric("fmdeploy_resident_bytes")
        answers = burst(server, BURST)
        dropped = [ms for status, reasons, ms in answers if status == 503 and reasons == ["DROPPED"]]
        valid = [ms for status, _, ms in answers if status == 200]
        assert len(dropped) + len(valid) == BURST, answers
        assert len(valid) >= QUEUE, "those who wait last are served"
        assert len(dropped) >= BURST // 4, "the burst was no burst: the test proves nothing"
        assert server.metric("fmdeploy_dropped_frames") == len(dropped)
        assert server.metric('fmdeploy_frame_reasons_total{reason="DROPPED"}') == len(dropped)
        assert server.metric("fmdeploy_queue_depth") == 0
        assert server.metric("fmdeploy_resident_bytes") - before < 64 * 2**20
        assert server.infer(frame(0)).status == 200
        fdti.report(min(dropped), f"{len(dropped)} of {BURST} dropped")


def test_F16_control_one_after_the_other(tmp_path: Path) -> None:
    with serving(tmp_path, *EMBEDDED, "--queue", str(QUEUE), bundle=slow_bundle()) as server:
        assert [server.infer(frame(seed)).status for seed in range(8)] == [200] * 8
        assert server.metric("fmdeploy_dropped_frames") == 0


def test_F16_the_newest_frame_is_the_one_that_runs() -> None:
    """The line itself: of 100 frames, exactly the last ones are left, in order."""
    import asyncio

    from fmdeploy.runtime.serve.line import Job, WaitingLine

    async def fill() -> list[int]:
        line, loop = WaitingLine(QUEUE), asyncio.get_running_loop()
        jobs = [Job(None, loop.create_future(), lambda: False) for _ in range(BURST)]  # type: ignore[arg-type]
        dropped = [line.put(job) for job in jobs]
        assert dropped[QUEUE:] == jobs[:-QUEUE]
        assert all(job.answer.exception() is not None for job in jobs[:-QUEUE])
        return [jobs.index(job) for _ in range(BURST) if (job := line.get(0.001)) is not None]

    assert asyncio.run(fill()) == [BURST - 2, BURST - 1]


# F23: the model on disk changes under a running server


def truncate(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size // 2)


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(fp32_model(16, 8, 1))
    os.replace(other, path)


HARM: dict[str, Callable[[Path], None]] = {"unlink": Path.unlink, "truncate": truncate, "replace": replace}


@pytest.mark.parametrize("supervisor", ["--no-supervisor", "--supervisor"])
def test_F23_files_change_after_load(fdti: Fdti, tmp_path: Path, truth: dict[int, Arrays], supervisor: str) -> None:
    root = shutil.copytree(toy_bundle(), tmp_path / "bundle")
    check_s = PERIOD_MS / 1e3
    with serving(tmp_path, "--tiers", "fp32", supervisor, "--check-s", str(check_s), bundle=root) as server:
        for count, (name, harm) in enumerate(HARM.items(), 1):
            begin = time.monotonic()
            for file in (*sorted(root.glob("*.onnx")), root / "golden.safetensors"):
                harm(file)
            wait_for(lambda: server.metric("fmdeploy_model_changed") == 1)
            fdti.report(1e3 * (time.monotonic() - begin), f"{name}, {supervisor[2:]}, checked every {PERIOD_MS:g} ms")
            for seed in range(3 * count, 3 * count + 3):
                answer = server.infer(frame(seed))
                assert answer.status == 200
                assert same(outputs_of(answer), truth[seed])
                assert "MODEL_CHANGED" in parameters_of(answer)["reasons"]
            assert server.ask("GET", "/health").json()["model_changed"]
            assert server.ask("GET", "/v2/health/ready").status == 200
            shutil.rmtree(root)
            shutil.copytree(toy_bundle(), root)
            wait_for(lambda: server.metric("fmdeploy_model_changed") == 0)
        assert "MODEL_CHANGED" not in parameters_of(server.infer(frame(20)))["reasons"]
        assert server.stop() == 0


def test_F23_control_untouched_files(tmp_path: Path) -> None:
    with serving(tmp_path, *EMBEDDED, "--check-s", str(PERIOD_MS / 1e3)) as server:
        wait_for(lambda: server.metric("fmdeploy_disk_checks_total") >= 3)
        assert server.metric("fmdeploy_model_changed") == 0
        assert parameters_of(server.infer(frame(1)))["reasons"] == ""
        assert not [note for note in server.notes() if note["event"].startswith("MODEL_")]


# F24: reload


@contextlib.contextmanager
def hammered(server: Server) -> Iterator[list[int]]:
    """Frames all the time; statuses of their answers."""
    statuses: list[int] = []
    stop = threading.Event()

    def run() -> None:
        seed = 100
        while not stop.is_set():
            statuses.append(server.infer(frame(seed)).status)
            seed += 1

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield statuses
    finally:
        stop.set()
        thread.join(60)


def point(link: Path, target: Path) -> None:
    fresh = link.with_name("fresh")
    fresh.symlink_to(target)
    os.replace(fresh, link)


@pytest.mark.parametrize("supervisor", ["--no-supervisor", "--supervisor"])
def test_F24_reload_is_all_or_nothing(fdti: Fdti, tmp_path: Path, truth: dict[int, Arrays], supervisor: str) -> None:
    broken = shutil.copytree(toy_bundle(), tmp_path / "broken")
    truncate(broken / "model.fp32.onnx")
    untrue = make_bundle(tmp_path / "untrue", models={"fp32": fp32_model(16, 8)}, change=other_model).root
    better = make_bundle(tmp_path / "better", models={"fp32": fp32_model(16, 8, 3)}).root
    link = tmp_path / "current"
    link.symlink_to(toy_bundle())
    with serving(tmp_path, "--tiers", "fp32", supervisor, "--queue", "64", bundle=link) as server:
        assert server.model == "current"
        version = server.ask("GET", "/v2/models/current").json()["versions"]
        with hammered(server) as statuses:
            bad_ones = (broken, untrue, tmp_path / "absent") if supervisor == "--no-supervisor" else (untrue,)
            for count, bad in enumerate(bad_ones, 1):
                point(link, bad)
                begin = time.monotonic()
                server.process.send_signal(signal.SIGHUP)
                server.await_note("RELOAD_FAILED", count)
                fdti.report(1e3 * (time.monotonic() - begin), f"{bad.name}, {supervisor[2:]}")
                answer = server.infer(frame(count))
                assert answer.status == 200
                assert same(outputs_of(answer), truth[count])
                assert server.ask("GET", "/health").json()["failed_reload"]
                assert server.ask("GET", "/v2/models/current").json()["versions"] == version
            assert server.metric('fmdeploy_reloads_total{result="failed"}') == len(bad_ones)
            point(link, better)
            server.process.send_signal(signal.SIGHUP)
            server.await_note("RELOADED")
            assert server.ask("GET", "/v2/models/current").json()["versions"] != version
        assert statuses
        assert set(statuses) == {200}, "a frame was lost during a reload"
        assert server.ask("GET", "/health").json()["failed_reload"] == ""
        for seed in range(9, 13):
            answer = server.infer(frame(seed))
            assert parameters_of(answer)["bundle"] == open_bundle(better).digest, "the old model ran after the reload"
            assert not same(outputs_of(answer), truth[seed])
        assert server.stop() == 0


def other_model(draft: Any) -> None:
    """Sealed properly, and not the model that gave the golden outputs."""
    draft.path("model.fp32.onnx").write_bytes(fp32_model(16, 8, 5))


def test_F24_control_reload_of_a_good_bundle(tmp_path: Path, truth: dict[int, Arrays]) -> None:
    with serving(tmp_path, *EMBEDDED) as server:
        server.process.send_signal(signal.SIGHUP)
        server.await_note("RELOADED")
        assert same(outputs_of(server.infer(frame(1))), truth[1])
        assert server.metric('fmdeploy_reloads_total{result="failed"}') == 0
        refused = server.ask("POST", f"/v2/repository/models/{server.model}/load")
        assert refused.status == 403, "reload over HTTP is off by default"


# F35: those who listen go away


def test_F35_http_clients_and_readers_go_away(fdti: Fdti, tmp_path: Path, truth: dict[int, Arrays]) -> None:
    process = start(tmp_path / "log", "--tiers", "fp32")
    assert process.stdout is not None
    line = json.loads(process.stdout.readline())
    process.stdout.close()  # nobody reads what the server prints
    server = Server(process, line, tmp_path / "log")
    try:
        host, _, port = server.address.rpartition(":")
        head = f"POST {server.infer_path} HTTP/1.1\r\nHost: a\r\nContent-Length: 20480\r\n\r\n".encode()
        for rounds in range(20):
            for text in (b"", head[:10], head, head + bytes(5000), head + bytes(20480)):
                with socket.create_connection((host, int(port))) as sock:
                    sock.sendall(text)
                    if rounds % 2:  # a reset instead of an orderly end
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        begin = time.monotonic()
        wait_for(lambda: server.metric("fmdeploy_clients_gone_total") > 0)
        fdti.report(1e3 * (time.monotonic() - begin), "clients that leave")
        for seed in range(3):
            answer = server.infer(frame(seed))
            assert answer.status == 200
            assert same(outputs_of(answer), truth[seed])
        assert server.stop() == 0
    finally:
        process.kill()
        process.wait()


def test_F35_control_patient_http_clients(tmp_path: Path) -> None:
    with serving(tmp_path, *EMBEDDED) as server:
        assert [server.infer(frame(seed)).status for seed in range(5)] == [200] * 5
        assert server.metric("fmdeploy_clients_gone_total") == 0


# F36: the address is taken


def refused_start(tmp_path: Path, *options: str) -> tuple[int, str, str]:
    process = start(tmp_path / "log", *EMBEDDED, *options)
    out, _ = process.communicate(timeout=60)
    return process.returncode, out, (tmp_path / "log").read_text()


def test_F36_port_in_use(fdti: Fdti, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with fdti.detecting("start of the process included"):
            code, out, err = refused_start(tmp_path, "--http", f"127.0.0.1:{taken.getsockname()[1]}")
    assert code == 2
    assert out == ""
    assert "in use" in err
    assert len(err.splitlines()) == 1


def test_F36_unix_socket_in_use(fdti: Fdti, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(path))
        taken.listen()
        with fdti.detecting("Unix socket"):
            code, out, err = refused_start(tmp_path, "--unix", str(path))
        assert (code, out) == (2, "")
        assert "in use" in err
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))  # the other server kept its socket


@pytest.mark.parametrize(("http", "unix", "allow_remote", "words"), [
    ("0.0.0.0:0", None, False, "other machines can reach"), ("[::]:0", None, False, "other machines can reach"),
    ("192.0.2.1:0", None, True, "cannot listen"), ("nonsense", None, False, "is no address"),
    ("127.0.0.1:70000", None, False, "is no address"), ("127.0.0.1:-1", None, False, "is no address"),
    ("", Path("/nonexistent/folder/s"), False, "cannot listen"), ("127.0.0.1:0", Path("s"), False, "two places"),
    ("", Path("/tmp/" + "x" * 200), False, "cannot listen"),
])
def test_F36_addresses_that_cannot_be(http: str, unix: Path | None, allow_remote: bool, words: str) -> None:
    with pytest.raises(InputError, match=words):
        listen(http, unix, allow_remote=allow_remote)


def test_F36_a_file_is_not_replaced_by_a_socket(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("mine")
    with pytest.raises(InputError, match="no socket"):
        listen("", tmp_path / "s", allow_remote=False)
    assert (tmp_path / "s").read_text() == "mine"


def test_F36_control_free_and_stale_addresses(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with serving(tmp_path, *EMBEDDED, "--unix", str(path)) as killed:
        killed.process.kill()
        killed.process.wait()
        assert path.exists(), "a killed server leaves its socket behind"
        with serving(tmp_path, *EMBEDDED, "--unix", str(path)) as server:
            assert server.infer(frame(0)).status == 200
            assert path.stat().st_mode & 0o777 == 0o660
            assert server.stop() == 0
            assert not path.exists()
    port = free_port()
    listener = listen(f"127.0.0.1:{port}", None, allow_remote=False)
    assert listener.address == f"127.0.0.1:{port}"
    listener.socket.close()


# F39: probes while the model loads


def probe(process: subprocess.Popen[str], path: Path) -> Iterator[tuple[int, int, float]]:
    """Statuses of live and ready, and how long they took, from the first answer on."""
    while process.poll() is None:
        with contextlib.suppress(OSError):
            begin = time.monotonic()
            with contextlib.closing(connect(str(path))) as connection:
                found = []
                for url in ("/v2/health/live", "/v2/health/ready"):
                    connection.request("GET", url)
                    answer = connection.getresponse()
                    found.append(answer.status)
                    answer.read()
            yield found[0], found[1], 1e3 * (time.monotonic() - begin)
        time.sleep(0.02)  # a probe, no load


def test_F39_not_ready_while_loading(fdti: Fdti, tmp_path: Path) -> None:
    path = tmp_path / "s"
    process = start(tmp_path / "log", "--tiers", "fp32", "--unix", str(path), bundle=slow_bundle())
    try:
        seen: list[tuple[int, int, float]] = []
        for sample in probe(process, path):
            if not seen:
                early = Server(process, {"address": str(path), "model": "slow"}, tmp_path / "log").infer(frame(0))
            seen.append(sample)
            if sample[1] == 200:
                break
        live, ready = {one[0] for one in seen}, [one[1] for one in seen]
        assert live == {200}
        assert ready[0] == 503, "the probe came too late to see the load"
        assert ready == sorted(ready, reverse=True), "ready, and then not"
        assert early.status == 503
        assert early.reasons == ["NOT_READY"]
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["address"] == str(path)
        fdti.report(seen[0][2], f"{len(seen)} probes")
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_F39_a_model_that_fails_its_self_test_is_never_ready(tmp_path: Path) -> None:
    """Positive control: ready comes from the self-test, not from time."""
    path = tmp_path / "s"
    untrue = make_bundle(tmp_path / "untrue", models={"fp32": fp32_model(16, 512)}, change=untrue_golden).root
    process = start(tmp_path / "log", *EMBEDDED, "--unix", str(path), bundle=untrue)
    seen = {ready for _, ready, _ in probe(process, path)}
    out, _ = process.communicate(timeout=60)
    assert seen <= {503}
    assert seen, "never probed"
    assert process.returncode == 2
    assert out == ""
    assert "no tier passes" in (tmp_path / "log").read_text()
    assert not path.exists()


def untrue_golden(draft: Any) -> None:
    draft.path("model.fp32.onnx").write_bytes(fp32_model(16, 512, 5))


def test_F39_control_ready_after_the_self_test(tmp_path: Path) -> None:
    with serving(tmp_path, *EMBEDDED) as server:
        assert server.ask("GET", "/v2/health/ready").status == 200


# T14: concurrency


def test_T14_eight_threads_share_one_runtime(fdti: Fdti, truth: dict[int, Arrays]) -> None:
    with runtime() as shared:
        def work(first: int) -> list[bool]:
            return [same(shared.infer(frame(seed)).outputs, truth[seed]) for seed in range(first, 64, 8)]

        with fdti.detecting("64 frames compared in every bit"):
            results = at_once([functools.partial(work, first) for first in range(8)])
    assert sum(map(len, results)) == 64
    assert all(all(found) for found in results)


def test_T14_eight_clients_share_one_server(tmp_path: Path, truth: dict[int, Arrays]) -> None:
    with serving(tmp_path, "--tiers", "fp32", "--queue", "8") as server:
        def work(first: int) -> list[bool]:
            return [same(outputs_of(server.infer(frame(seed))), truth[seed]) for seed in range(first, 64, 8)]

        results = at_once([functools.partial(work, first) for first in range(8)])
    assert sum(map(len, results)) == 64
    assert all(all(found) for found in results)


def test_T14_control_the_comparison_sees_a_swap(truth: dict[int, Arrays]) -> None:
    assert not any(same(truth[seed], truth[seed + 1]) for seed in range(63))


# The end


def test_drains_on_sigterm(tmp_path: Path) -> None:
    """Frames that were accepted are answered, new ones refused, and the exit code is 0."""
    with serving(tmp_path, *EMBEDDED, "--queue", "32", bundle=slow_bundle()) as server:
        answers: list[int] = []
        threads = [threading.Thread(target=lambda seed=seed: answers.append(server.infer(frame(seed)).status))
                   for seed in range(24)]
        for thread in threads:
            thread.start()
        wait_for(lambda: server.metric("fmdeploy_queue_depth") >= 3)  # a burst that takes about a second
        assert server.stop() == 0
        for thread in threads:
            thread.join(60)
        assert len(answers) == 24
        assert set(answers) <= {200, 503}
        assert 200 in answers
        assert [note["event"] for note in server.notes()][-2:] == ["DRAINING", "STOPPED"]


def test_a_reload_is_no_stop_to_the_service_manager(tmp_path: Path) -> None:
    """STOPPING=1 of a replaced model would make systemd end the service."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        with serving(tmp_path, "--tiers", "fp32", env={"NOTIFY_SOCKET": str(tmp_path / "notify")}) as server:
            server.process.send_signal(signal.SIGHUP)
            server.await_note("RELOADED")
            assert server.infer(frame(0)).status == 200
            assert server.stop() == 0
        manager.setblocking(False)
        heard = []
        with contextlib.suppress(BlockingIOError):
            while True:
                heard.append(manager.recv(4096).decode())
    assert sum("READY=1" in text for text in heard) == 2
    assert sum("STOPPING=1" in text for text in heard) == 1, heard
    assert "STOPPING=1" in heard[-1]
