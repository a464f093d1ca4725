"""Throughput of `fmdeploy serve` against a bare uvicorn + starlette application around the same session.

    python benchmarks/serve_throughput.py [--bundle DIR] [--seconds S] [--rounds N] [--supervisor]
                                          [--mlserver PYTHON]

All servers run at once as processes of one thread and take turns, in alternating order; one client sends the same
frames over one kept connection each. The bare application reads the raw body without any protocol, runs the session in
starlette's thread pool and answers raw bytes; `bare B` is a second one of the same kind (A/A control). `bare, on loop`
runs the session in the event loop, which is faster for one client and stops every other one meanwhile.
`--mlserver PYTHON` is the interpreter of a virtual environment with `pip install mlserver onnxruntime`: a custom
runtime there answers the same KServe request with the same session.
Targets: at least 0.9 of the bare application, at least 3 times MLServer.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from fmdeploy.arrays import Array, Arrays
from fmdeploy.runtime.bundle import Bundle, open_bundle
from support.bundles import make_bundle
from support.servers import free_port

FRAMES = 32  # more than the frozen guard counts
BARE_TARGET, MLSERVER_TARGET = 0.9, 3.0

BARE = '''
import sys, numpy as np, onnxruntime, uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.routing import Route

model, port, mode = sys.argv[1:4]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
options.add_session_config_entry("session.intra_op.allow_spinning", "0")
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
inputs = [(i.name, i.shape, int(np.prod(i.shape))) for i in session.get_inputs()]
names = [output.name for output in session.get_outputs()]

def run(body):
    feeds, at = {}, 0
    for name, shape, count in inputs:
        feeds[name] = np.frombuffer(body, np.float32, count, at).reshape(shape)
        at += 4 * count
    return b"".join(array.tobytes() for array in session.run(names, feeds))

async def infer(request):
    body = await request.body()
    return Response(run(body) if mode == "loop" else await run_in_threadpool(run, body))

uvicorn.run(Starlette(routes=[Route("/", infer, methods=["POST"])]), port=int(port), log_level="critical",
            http="httptools", loop="uvloop", access_log=False, server_header=False, date_header=False)
'''

MLSERVER = '''
import numpy as np, onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse

class Session(MLModel):
    async def load(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(self.settings.parameters.uri, options,
                                                    providers=["CPUExecutionProvider"])
        self.names = [output.name for output in self.session.get_outputs()]
        return True

    async def predict(self, payload):
        feeds = {i.name: NumpyCodec.decode_input(i).astype(np.float32, copy=False) for i in payload.inputs}
        outputs = self.session.run(self.names, feeds)
        return InferenceResponse(model_name=self.name, outputs=[
            NumpyCodec.encode_output(name, array) for name, array in zip(self.names, outputs)])
'''


class Target(NamedTuple):
    """A running server: how to ask it."""

    name: str
    pid: int
    connection: http.client.HTTPConnection
    path: str
    headers: dict[str, str]
    bodies: list[bytes]

    def ask(self, number: int) -> bytes:
        """Send one frame and return the answer's body."""
        self.connection.request("POST", self.path, self.bodies[number % len(self.bodies)], self.headers)
        response = self.connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise SystemExit(f"{self.name}: {response.status} {body[:300]!r}")
        return body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--tier", default="int8-cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one turn of one server")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--supervisor", action="store_true", help="measure the supervised server, too")
    parser.add_argument("--mlserver", type=Path, metavar="PYTHON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as servers:
        work = Path(scratch)
        bundle = open_bundle(options.bundle or make_bundle(work / "bundle", size=64).root)
        targets = start_all(options, bundle, work, servers)
        turns = measure(targets, options.rounds, options.seconds)
    report(turns)


def start_all(options: Any, bundle: Bundle, work: Path, servers: contextlib.ExitStack) -> list[Target]:
    """Start every server and return how to ask each."""
    frames = fresh_frames(bundle, FRAMES)
    raw = [b"".join(frame[spec.name].tobytes() for spec in bundle.io.inputs) for frame in frames]
    model = bundle.artifact.root / f"model.{options.tier}.onnx"
    targets = []
    for name, mode in (("bare A", "pool"), ("bare B", "pool"), ("bare, on loop", "loop")):
        pid, port = servers.enter_context(python(work, "bare.py", BARE, [str(model), "PORT", mode]))
        targets.append(Target(name, pid, connect(port), "/", {}, raw))
    mine = {"fmdeploy": "--no-supervisor", **({"fmdeploy, supervised": "--supervisor"} if options.supervisor else {})}
    for name, flag in mine.items():
        line = servers.enter_context(fmdeploy(bundle.artifact.root, options.tier, flag))
        port = line["address"].rpartition(":")[2]
        path = f"/v2/models/{line['model']}/infer"
        heads = [binary_request(bundle, frame) for frame in frames]
        header = {"Inference-Header-Content-Length": str(heads[0][0])}
        targets.append(Target(name, line["pid"], connect(int(port)), path, header, [body for _, body in heads]))
        if name == "fmdeploy":
            texts = [json_request(frame) for frame in frames]
            targets.append(Target("fmdeploy, JSON", line["pid"], connect(int(port)), path, {}, texts))
    if options.mlserver:
        pid, port = servers.enter_context(mlserver(options.mlserver, model, work))
        bodies = [json_request(frame) for frame in frames]
        kind = {"Content-Type": "application/json"}
        targets.append(Target("MLServer, JSON", pid, connect(port), "/v2/models/session/infer", kind, bodies))
        targets += binary_mlserver(pid, port, bundle, frames)
    for target in targets:
        for number in range(2 * FRAMES):
            target.ask(number)
    return targets


class Turn(NamedTuple):
    """One turn of one server: requests a second, and the CPU time that the server spent on each."""

    rate: float
    cpu_us: float


def measure(targets: list[Target], rounds: int, seconds: float) -> dict[str, list[Turn]]:
    """One turn a round of every server, in alternating order."""
    turns: dict[str, list[Turn]] = {target.name: [] for target in targets}
    for number in range(rounds):
        for target in targets if number % 2 == 0 else targets[::-1]:
            target.connection.close()  # it may have been idle for too long; the first answer is not counted
            target.ask(0)
            count, start, cpu = 0, time.perf_counter(), cpu_ns(target.pid)
            while (took := time.perf_counter() - start) < seconds:
                target.ask(count)
                count += 1
            turns[target.name].append(Turn(count / took, (cpu_ns(target.pid) - cpu) / 1e3 / count))
    return turns


def cpu_ns(pid: int) -> int:
    """CPU time of a process and its children: tells their costs apart also where other programs run."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            total += int((task / "schedstat").read_text().split()[0])
            total += sum(cpu_ns(int(child)) for child in (task / "children").read_text().split())
    return total


def report(turns: dict[str, list[Turn]]) -> None:
    """Medians, and medians of the ratios of rounds."""
    print(f"{'server':24} {'requests/s':>10}   of bare A   CPU µs a request")
    for name, found in turns.items():
        rate, cpu = (statistics.median(values) for values in zip(*found, strict=True))
        print(f"{name:24} {rate:10.1f}   {ratio_of(turns, name, 'bare A'):9.3f}   {cpu:8.0f}")
    for name in ("fmdeploy", "fmdeploy, supervised"):
        if name in turns:
            print(f"{name} / bare: {ratio_of(turns, name, 'bare A'):.3f} and {ratio_of(turns, name, 'bare B'):.3f} "
                  f"(target {BARE_TARGET}), of bare on loop {ratio_of(turns, name, 'bare, on loop'):.3f}; "
                  f"A/A {ratio_of(turns, 'bare B', 'bare A'):.3f}")
    servers = [name for name in turns if name.startswith("MLServer")]
    if servers:
        best = max(servers, key=lambda name: statistics.median(turn.rate for turn in turns[name]))
        print(f"fmdeploy / {best}: {ratio_of(turns, 'fmdeploy', best):.2f} (target {MLSERVER_TARGET:g}); JSON on both "
              f"sides: {ratio_of(turns, 'fmdeploy, JSON', 'MLServer, JSON'):.2f}")


def ratio_of(turns: dict[str, list[Turn]], one: str, other: str) -> float:
    """Median over rounds of the ratio of rates within a round."""
    return statistics.median(a.rate / b.rate for a, b in zip(turns[one], turns[other], strict=True))


def fresh_frames(bundle: Bundle, count: int) -> list[Arrays]:
    """Golden frames with one cell more or less each, so that no two are the same."""
    frames = []
    for number in range(count):
        frame = {name: np.ascontiguousarray(array) for name, array in
                 bundle.golden.sample(number % len(bundle.golden)).items()}
        for array in frame.values():
            flat: Array = array.reshape(-1)
            flat[number] = 1.0 - flat[number]
        frames.append({name: array.copy() for name, array in frame.items()})
    return frames


def binary_request(bundle: Bundle, frame: Arrays) -> tuple[int, bytes]:
    """One KServe request with binary tensors; the size of its JSON comes first."""
    inputs = [{"name": s.name, "shape": [1, *s.shape], "datatype": "FP32",
               "parameters": {"binary_data_size": frame[s.name].nbytes}} for s in bundle.io.inputs]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    return len(head), head + b"".join(frame[spec.name].tobytes() for spec in bundle.io.inputs)


def json_request(frame: Arrays) -> bytes:
    """One KServe request in JSON."""
    return json.dumps({"inputs": [
        {"name": name, "shape": [1, *array.shape], "datatype": "FP32", "data": array.reshape(-1).tolist()}
        for name, array in frame.items()
    ]}).encode()


def connect(port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", port, timeout=60)


@contextlib.contextmanager
def python(work: Path, name: str, source: str, arguments: list[str]) -> Iterator[tuple[int, int]]:
    """Run a small server until the end; `PORT` among its arguments becomes a free one. Gives process id and port."""
    script, port = work / name, free_port()
    script.write_text(source)
    words = [str(port) if word == "PORT" else word for word in arguments]
    with running([sys.executable, str(script), *words]) as process:
        wait_for(port)
        yield process.pid, port


@contextlib.contextmanager
def fmdeploy(root: Path, tier: str, flag: str) -> Iterator[dict[str, Any]]:
    words = [sys.executable, "-m", "fmdeploy", "serve", str(root), "--http", "127.0.0.1:0", "--tiers", tier, flag]
    with running(words, stdout=subprocess.PIPE, text=True) as process:
        yield json.loads(process.stdout.readline())


@contextlib.contextmanager
def mlserver(interpreter: Path, model: Path, work: Path) -> Iterator[tuple[int, int]]:
    """MLServer with a custom runtime, in its fastest setting for one client: no worker processes, no metrics."""
    folder = work / "mlserver"
    folder.mkdir()
    port, others = free_port(), (free_port(), free_port())
    (folder / "session_runtime.py").write_text(MLSERVER)
    (folder / "settings.json").write_text(json.dumps({
        "http_port": port, "grpc_port": others[0], "metrics_port": others[1], "host": "127.0.0.1",
        "parallel_workers": 0, "metrics_endpoint": None, "debug": False}))
    (folder / "model-settings.json").write_text(json.dumps({
        "name": "session", "implementation": "session_runtime.Session", "parameters": {"uri": str(model)}}))
    code = "import sys; from mlserver.cli import main; sys.argv = ['mlserver', 'start', '.']; main()"
    words = [str(interpreter), "-c", code]
    with running(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(port, "/v2/models/session/ready")
        yield process.pid, port


def binary_mlserver(pid: int, port: int, bundle: Bundle, frames: list[Arrays]) -> list[Target]:
    """The same server asked in binary, if it understands that."""
    requests = [binary_request(bundle, frame) for frame in frames]
    headers = {"Inference-Header-Content-Length": str(requests[0][0]), "Content-Type": "application/octet-stream"}
    bodies = [body for _, body in requests]
    target = Target("MLServer, binary", pid, connect(port), "/v2/models/session/infer", headers, bodies)
    try:
        target.ask(0)
    except SystemExit as error:
        print(f"no binary tensors: {str(error)[:120]}")
        return []
    return [target]


@contextlib.contextmanager
def running(words: list[str], **options: Any) -> Iterator[Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, env=environment, **options) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_for(port: int, path: str = "/", seconds: float = 60.0) -> None:
    """Wait until a server answers at all, or answers 200 where a path is named."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
            connection.request("GET", path)
            if connection.getresponse().status == 200 or path == "/":
                return
        time.sleep(0.1)
    raise SystemExit(f"no server came up on port {port}")


if __name__ == "__main__":
    main()
