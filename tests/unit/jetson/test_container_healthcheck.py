"""The health check inside the image, against real servers on Unix sockets."""

from __future__ import annotations

import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from fmdeploy.jetson.container.healthcheck import ready


class Server(socketserver.ThreadingUnixStreamServer):
    """Answers every request with one status, or not at all."""

    daemon_threads = True
    status = 200
    silent = False


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        status = self.server.status if self.path == "/v2/health/ready" else 404
        if self.server.silent:
            self.rfile.read(1)  # until the client goes away
            return
        body = b'{"ready": true}'
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Stay silent."""

    def address_string(self) -> str:
        return "unix"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(str(tmp_path / "s"), Handler) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,))
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def test_ready(server: Server) -> None:
    good, text = ready(str(server.server_address))
    assert (good, text) == (True, '200 {"ready": true}')


def test_not_ready(server: Server) -> None:
    server.status = 503
    good, text = ready(str(server.server_address))
    assert not good
    assert text.startswith("503")


def test_a_server_that_hangs_is_not_healthy(server: Server) -> None:
    server.silent = True
    good, text = ready(str(server.server_address), timeout_s=0.2)
    assert not good
    assert "timed out" in text


def test_no_server(tmp_path: Path) -> None:
    good, text = ready(str(tmp_path / "none"))
    assert not good
    assert "FileNotFoundError" in text


def test_as_a_program_it_needs_the_standard_library_only(server: Server) -> None:
    check = [sys.executable, "-X", "importtime", "-m", "fmdeploy.jetson.container.healthcheck", str(server.server_address)]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, '200 {"ready": true}')
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"numpy", "pydantic", "click", "onnxruntime", "docker"}
    server.status = 503
    assert subprocess.run(check, capture_output=True, check=False).returncode == 1
