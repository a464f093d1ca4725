"""Soak: a real server process under the stress mix of Triton's own tests, a fifth of the requests faulty.

    python benchmarks/soak.py [--seconds 1800 | --frames 10000] [--bundle DIR] [--clients 4] [--faulty 0.2]

Clients send valid frames and, by weight: NaN, values out of range, a black frame, a wrong shape, what is no KServe
request, stamps from long ago, deadlines that cannot be held, and they crash: they go away in the middle of a request,
or before its answer. Now and then the worker process is killed. Asserted, each with its figure:

- every answer that says it is valid has the bits that the embedded runtime gives for that input and tier;
- no faulty request gets a valid answer;
- no process ends that was not killed on purpose, and the server drains and exits 0;
- resident memory of the server, and of every worker, grows by less than 20 MiB after its warm-up.

The memory of a process is compared only with that of its own past: a worker that was killed begins anew.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from fmdeploy.arrays import Arrays
from fmdeploy.runtime import Runtime
from support.bundles import make_bundle
from support.servers import Answer, Server, binary_request, outputs_of, parameters_of, serving

TIERS = ("int8-cpu", "fp32")
VALID_FRAMES = 64
LIMIT_MIB = 20.0
WARM_UP = 0.2  # share of the run that counts as warm-up of every process, within these limits
LEAST_WARM_UP_S, LONGEST_WARM_UP_S = 4.0, 60.0
# Weights as in Triton's L0_long_running_stress: crashing clients and timeouts weigh most.
FAULTS = {"crash": 60, "timeout": 60, "nan": 40, "range": 20, "black": 20, "shape": 30, "garbage": 30, "stale": 40}
ALLOWED = {"nan": {422}, "range": {422}, "black": {422}, "shape": {400}, "garbage": {400}, "stale": {422},
           "timeout": {503}}


class Known(NamedTuple):
    """Frames, and what each tier makes of them."""

    frames: list[Arrays]
    outputs: dict[str, list[Arrays]]


class Tally:
    """What happened, over all clients."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kinds: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.valid = 0

    @property
    def total(self) -> int:
        """Requests so far."""
        return sum(self.kinds.values())

    def note(self, kind: str, status: int, *, wrong: str = "") -> None:
        """Count one request."""
        with self.lock:
            self.kinds[kind] += 1
            self.statuses[f"{kind} {status}"] += 1
            self.valid += kind == "valid" and status == 200 and not wrong
            if wrong:
                self.wrong.append(f"{kind} {status} {wrong}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--frames", type=int, help="stop after so many requests instead")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--faulty", type=float, default=0.2)
    parser.add_argument("--kill-every-s", type=float, default=60.0, help="of the worker; 0: never")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = options.bundle or make_bundle(Path(folder) / "bundle").root
        failures = soak(options, root, Path(folder))
    for failure in failures:
        print(f"FAILED: {failure}")
    sys.exit(1 if failures else 0)


def soak(options: Any, root: Path, work: Path) -> list[str]:
    """Run everything; print the figures and return what is not as it must be."""
    known, tally, stop = reference(root), Tally(), threading.Event()
    with serving(work, "--unix", str(work / "s"), "--queue", "16", "--tiers", TIERS[0], "--tiers", TIERS[1],
                 bundle=root) as server:
        threads = [threading.Thread(target=client, args=(server, known, tally, stop, options, number))
                   for number in range(options.clients)]
        for thread in threads:
            thread.start()
        memory, kills = watch(server, tally, stop, options)
        stop.set()
        for thread in threads:
            thread.join(120)
        health = server.ask("GET", "/health").json()
        alive = server.process.poll() is None
        code = server.stop() if alive else server.process.returncode
    return report(tally, memory, kills, health, alive=alive, code=code)


def reference(root: Path) -> Known:
    """Golden frames with a cell changed each, and the embedded runtime's outputs on every tier."""
    outputs: dict[str, list[Arrays]] = {}
    frames: list[Arrays] = []
    for tier in TIERS:
        with Runtime(root, tiers=(tier,)) as runtime:
            if not frames:
                frames = [changed(runtime.bundle.golden.sample(number % len(runtime.bundle.golden)), number)
                          for number in range(VALID_FRAMES)]
            outputs[tier] = [runtime.infer(frame).require_valid().outputs for frame in frames]
    return Known(frames, outputs)


def changed(sample: Arrays, number: int) -> Arrays:
    """A copy in which one cell of each input is flipped: no two frames are the same."""
    frame = {name: array.copy() for name, array in sample.items()}
    for array in frame.values():
        array.reshape(-1)[number] = 1.0 - array.reshape(-1)[number]
    return frame


def client(server: Server, known: Known, tally: Tally, stop: threading.Event, options: Any, number: int) -> None:
    """One client: requests one after the other, until everything stops."""
    choose = random.Random(options.seed * 1000 + number)
    connection = server.connection()
    while not stop.is_set():
        kind = choose.choices(list(FAULTS), list(FAULTS.values()))[0] if choose.random() < options.faulty else "valid"
        try:
            if kind == "crash":
                crash(server, known, choose)
                tally.note(kind, 0)
            else:
                ask(server, connection, known, tally, kind, choose.randrange(VALID_FRAMES), choose)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            if not stop.is_set():
                tally.note(kind, 0, wrong=f"no answer: {error!r}")
    connection.close()


def ask(
    server: Server, connection: http.client.HTTPConnection, known: Known, tally: Tally, kind: str, number: int,
    choose: random.Random,
) -> None:
    """Send one request on the kept connection and judge its answer."""
    headers, body = request(known.frames[number], kind, choose)
    connection.request("POST", server.infer_path, body, headers)
    answer = Answer(connection.getresponse())
    if kind != "valid":
        fine = answer.status in ALLOWED[kind] or answer.status == 503
        tally.note(kind, answer.status, wrong="" if fine else str(answer.body[:200]))
    elif answer.status == 200:
        tier = parameters_of(answer)["tier"]
        found, wanted = outputs_of(answer), known.outputs[tier][number]
        equal = found.keys() == wanted.keys() and all(np.array_equal(found[name], wanted[name]) for name in wanted)
        tally.note(kind, 200, wrong="" if equal else f"other bits than {tier} gives")
    else:
        tally.note(kind, answer.status, wrong="" if answer.status == 503 else str(answer.body[:200]))


def request(frame: Arrays, kind: str, choose: random.Random) -> tuple[dict[str, str], bytes]:
    """Headers and body of one request of a kind."""
    frame = {name: array.copy() for name, array in frame.items()}
    first = next(iter(frame))
    if kind == "stale":
        return binary_request(frame, {"stamp_ns": time.monotonic_ns() - 3_000_000_000, "deadline_ms": 100})
    if kind == "timeout":
        return binary_request(frame, {"deadline_ms": 1e-3})
    if kind == "nan":
        frame[first].reshape(-1)[choose.randrange(frame[first].size)] = np.nan
    elif kind == "range":
        frame[first] *= 255.0
        frame[first].reshape(-1)[0] = 255.0
    elif kind == "black":
        frame[first][:] = 0.0
    elif kind == "shape":
        frame[first] = np.moveaxis(frame[first], 0, -1)[:, 1:]
    headers, body = binary_request(frame)
    if kind == "garbage":
        body = choose.choice([body[:-4], body + b"\0" * 4, b"{" * 5000, choose.randbytes(1000), b"", body[::-1]])
    return headers, body


def crash(server: Server, known: Known, choose: random.Random) -> None:
    """Go away in the middle of a request, or before its answer; in order, or by a reset."""
    headers, body = binary_request(known.frames[0])
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    start = f"POST {server.infer_path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
    whole = f"{start}{lines}\r\n".encode() + body
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock, contextlib.suppress(OSError):
        sock.settimeout(10)
        sock.connect(server.address)
        sock.sendall(whole[: choose.choice([0, 10, 300, len(whole) // 2, len(whole)])])
        if choose.random() < 0.5:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


class Sample(NamedTuple):
    """Resident MiB by process id, and when."""

    at_s: float
    mib: dict[int, float]


def watch(server: Server, tally: Tally, stop: threading.Event, options: Any) -> tuple[list[Sample], int]:
    """Sample memory and kill workers until the time or the frames are over."""
    samples: list[Sample] = []
    start, kills, killed_s = time.monotonic(), 0, 0.0
    done: Callable[[float], bool] = (lambda took: took >= options.seconds) if options.frames is None else (
        lambda took: tally.total >= options.frames)
    period = 1.0 if options.frames is None and options.seconds > 60 else 0.1
    while not done(took := time.monotonic() - start) and server.process.poll() is None:
        pids = [server.process.pid, *children(server.process.pid)]
        samples.append(Sample(took, {pid: mib for pid in pids if (mib := resident_mib(pid))}))
        due = kills == 0 and options.frames is not None and tally.total >= options.frames // 2
        if options.kill_every_s and (due or took - killed_s >= options.kill_every_s) and len(pids) > 1:
            kills, killed_s = kills + kill_worker(pids[1:]), took
        stop.wait(period)
    return samples, kills


def children(pid: int) -> list[int]:
    """Process ids of the children, oldest first."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, task.read_text().split())
    return sorted(found)


def kill_worker(pids: list[int]) -> int:
    """Kill the oldest worker, which serves or is on standby; return how many were killed."""
    for pid in pids[:1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            return 1
    return 0


def resident_mib(pid: int) -> float:
    """Resident memory; 0 for a process that is gone."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) / 1024
    return 0.0


def growth_mib(samples: list[Sample], pid: int) -> float | None:
    """Growth of one process: the median of its last tenth less the most it had in its warm-up.

    None for a process that did not live long enough after its warm-up.
    """
    mine = [(sample.at_s, sample.mib[pid]) for sample in samples if pid in sample.mib]
    warm_s = mine[0][0] + max(LEAST_WARM_UP_S, min(LONGEST_WARM_UP_S, WARM_UP * samples[-1].at_s))
    warm, rest = [mib for at_s, mib in mine if at_s <= warm_s], [mib for at_s, mib in mine if at_s > warm_s]
    return statistics.median(rest[-max(3, len(rest) // 10):]) - max(warm) if len(rest) >= 10 else None


def report(
    tally: Tally, samples: list[Sample], kills: int, health: dict[str, Any], *, alive: bool, code: int
) -> list[str]:
    """Print the figures; return what is not as it must be."""
    server = next(iter(samples[0].mib))
    pids = {pid for sample in samples for pid in sample.mib}
    growth = {pid: grown for pid in pids if (grown := growth_mib(samples, pid)) is not None}
    worst_worker = max((growth[pid] for pid in growth if pid != server), default=None)
    losses = int(health["counters"].get("losses", 0))
    faulty = tally.total - tally.kinds["valid"]
    unavailable = tally.kinds["valid"] - tally.valid
    figures = {
        "seconds": round(samples[-1].at_s, 1), "requests": tally.total, "faulty": faulty,
        "faulty_share": round(faulty / max(tally.total, 1), 4), "valid_answers": tally.valid,
        "valid_frames_not_answered_valid": unavailable, "published_wrongly": len(tally.wrong),
        "worker_kills": kills, "worker_losses": losses, "exit_code": code, "state": health["state"],
        "server_growth_mib": growth.get(server), "worst_worker_growth_mib": worst_worker,
        "server_mib": round(samples[-1].mib.get(server, 0.0), 1), "processes": len(pids), "judged": len(growth),
        "statuses": dict(sorted(tally.statuses.items())),
    }
    print(json.dumps(figures, indent=1))
    checks = {
        f"{len(tally.wrong)} answers are not as they must be: {tally.wrong[:3]}": not tally.wrong,
        "the server ended by itself": alive, f"exit code {code}": code == 0,
        f"{losses} workers were lost, {kills} were killed": losses <= kills,
        f"the server grew by {growth.get(server)} MiB (None: not measured)": growth.get(server, LIMIT_MIB) < LIMIT_MIB,
        f"a worker grew by {worst_worker} MiB": worst_worker is None or worst_worker < LIMIT_MIB,
        "fewer than half of the valid frames were answered": 2 * tally.valid > tally.kinds["valid"],
    }
    return [text for text, fine in checks.items() if not fine]


if __name__ == "__main__":
    main()
