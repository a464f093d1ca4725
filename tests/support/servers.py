"""Real server processes on free ports and Unix sockets, and a client that sees every header."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from support.processes import FMDEPLOY
from support.runtimes import toy_bundle

Arrays = dict[str, np.ndarray[Any, Any]]
PATIENCE_S = 60.0


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=PATIENCE_S)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE_S)
        self.sock.connect(self.path)


class Answer:
    """Status, headers and body of one answer."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def reasons(self) -> list[str]:
        """Reason codes in the header."""
        return [code for code in (self.headers.get("fmdeploy-reasons") or "").split(",") if code]


class Server:
    """A running `fmdeploy serve`."""

    def __init__(self, process: subprocess.Popen[str], line: dict[str, Any], log: Path) -> None:
        self.process, self.line, self.log = process, line, log
        self.address, self.model = str(line["address"]), str(line["model"])
        self.infer_path = f"/v2/models/{self.model}/infer"

    def connection(self) -> http.client.HTTPConnection:
        """A connection that the caller closes."""
        return connect(self.address)

    def ask(
        self, method: str, path: str, body: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One request on a connection of its own."""
        with contextlib.closing(self.connection()) as connection:
            connection.request(method, path, body, dict(headers or {}))
            return Answer(connection.getresponse())

    def infer(self, frame: Arrays, **parameters: Any) -> Answer:
        """One binary request."""
        head, body = binary_request(frame, parameters)
        return self.ask("POST", self.infer_path, body, head)

    def metric(self, name: str) -> float:
        """The value of one line of /metrics."""
        for line in self.ask("GET", "/metrics").body.decode().splitlines():
            if line.startswith(name + " "):
                return float(line.rpartition(" ")[2])
        raise KeyError(name)

    def notes(self) -> list[dict[str, Any]]:
        """Lines of the log."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def await_note(self, event: str, count: int = 1) -> dict[str, Any]:
        """Wait for a line of the log."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            found = [note for note in self.notes() if note["event"] == event]
            if len(found) >= count:
                return found[-1]
            time.sleep(0.01)
        raise AssertionError(f"no {event} in {self.log.read_text()[-3000:]}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


def connect(address: str) -> http.client.HTTPConnection:
    """A connection to the address of a READY line."""
    if address.startswith("/"):
        return UnixConnection(address)
    host, _, port = address.rpartition(":")
    return http.client.HTTPConnection(host, int(port), timeout=PATIENCE_S)


def binary_request(frame: Arrays, parameters: Mapping[str, Any] | None = None) -> tuple[dict[str, str], bytes]:
    """Headers and body of a KServe request with binary tensors both ways."""
    inputs = [{"name": name, "shape": [1, *array.shape], "datatype": "FP32",
               "parameters": {"binary_data_size": array.nbytes}} for name, array in frame.items()]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True, **(parameters or {})}}).encode()
    body = head + b"".join(array.astype("<f4").tobytes() for array in frame.values())
    return {"Inference-Header-Content-Length": str(len(head))}, body


def outputs_of(answer: Answer) -> Arrays:
    """Arrays of a binary answer, without batch axis."""
    size = int(answer.headers["inference-header-content-length"])
    found, at = {}, size
    for output in json.loads(answer.body[:size])["outputs"]:
        used = output["parameters"]["binary_data_size"]
        found[output["name"]] = np.frombuffer(answer.body[at : at + used], "<f4").reshape(output["shape"][1:])
        at += used
    assert at == len(answer.body)
    return found


def parameters_of(answer: Answer) -> dict[str, Any]:
    """Frame facts of an answer, binary or not."""
    size = int(answer.headers.get("inference-header-content-length") or len(answer.body))
    facts: dict[str, Any] = json.loads(answer.body[:size])["parameters"]
    return facts


def start(
    log: Path, *options: str, bundle: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start a server on a free port, or where the options say; its log goes to a file."""
    where = () if {"--http", "--unix"} & set(options) else ("--http", "127.0.0.1:0")
    words = [*FMDEPLOY, "serve", str(bundle or toy_bundle()), *where, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    with log.open("a") as stream:
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=stream, text=True, env=environment)


@contextlib.contextmanager
def serving(
    folder: Path, *options: str, bundle: Path | None = None, env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """A server that is READY; killed at the end if the test did not stop it."""
    log = folder / f"serve-{time.monotonic_ns()}.log"
    process = start(log, *options, bundle=bundle, env=env)
    try:
        yield Server(process, ready_line(process, log), log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def ready_line(process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    """Wait for the READY line."""
    found: list[str] = []
    assert process.stdout is not None
    stream = process.stdout
    reader = threading.Thread(target=lambda: found.append(stream.readline()), daemon=True)
    reader.start()
    reader.join(PATIENCE_S)
    if not found or not found[0]:
        raise AssertionError(f"no READY line; log:\n{log.read_text()[-3000:]}")
    line: dict[str, Any] = json.loads(found[0])
    return line
