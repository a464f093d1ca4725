"""The telemetry process: `python -m fmdeploy.jetson.sampler SOCKET_FD ROOT RATE_HZ PID`.

It takes snapshots at a fixed rate and sends each, with the window so far, as one message. A message that nobody reads
in time is dropped: it never waits for its reader, as its reader never waits for it. It ends when its reader does.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from pathlib import Path
from typing import Any

from fmdeploy.jetson.snapshot import Probe
from fmdeploy.jetson.tegrastream import TegrastatsStream
from fmdeploy.jetson.window import Accumulator, Window

LOOK_AGAIN_S = 2.0
ANSWER_S = 1.0


class Sampler:
    """Snapshots, windows and the socket."""

    def __init__(self, link: socket.socket, root: Path, rate_hz: float, pid: int | None) -> None:
        self.link, self.period_s = link, 1.0 / rate_hz
        self.probe, self.tegrastats = Probe(root, pid), TegrastatsStream(root)
        self.sum, self.mark = Accumulator(board=self.probe.board), 0
        self._looked = time.monotonic()

    def run(self) -> None:
        """Sample until the other end is gone."""
        due = time.monotonic()
        while self._commands(max(0.0, due - time.monotonic())):
            if time.monotonic() >= due:
                self._sample(None)
                due = max(due + self.period_s, time.monotonic())
        self.tegrastats.close()

    def _commands(self, wait_s: float) -> bool:
        """Serve requests until a sample is due; False when there is nobody left to serve."""
        if not select.select([self.link], [], [], wait_s)[0]:
            return True
        try:
            raw = self.link.recv(4096)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not raw:
            return False
        request = json.loads(raw)
        if request["kind"] == "begin":
            self.sum, self.mark = Accumulator(board=self.probe.board), request["mark"]
            self.probe.look()
        elif request["kind"] == "watch":
            self.probe.pid = request["pid"]
        self._sample(request["token"])
        return True

    def _sample(self, token: int | None) -> None:
        if time.monotonic() - self._looked > LOOK_AGAIN_S:
            self.probe.look()
            self._looked = time.monotonic()
        now = self.probe.take()
        self.sum.add(now)
        self._tegrastats(self.sum.window)
        self._send({"token": token, "mark": self.mark, "now": now.to_json(), "window": self.sum.window.to_json()})

    def _tegrastats(self, window: Window) -> None:
        sample, window.tegrastats = self.tegrastats.poll(), self.tegrastats.state
        for name, rail in (sample.rails if sample else {}).items():
            low, high = window.rails_mw.get(name, (rail.now_mw, rail.now_mw))
            window.rails_mw[name] = min(low, rail.now_mw), max(high, rail.now_mw)

    def _send(self, message: dict[str, Any]) -> None:
        if message["token"] is not None:
            select.select([], [self.link], [], ANSWER_S)  # somebody waits for this one, and so makes room for it
        try:
            self.link.send(json.dumps(message).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return  # the reader is busy; the next message holds all of the window
        except OSError:
            return  # the reader is gone: `_commands` sees it


def main(descriptor: str, root: str, rate_hz: str, pid: str) -> None:
    """Serve the socket with this file descriptor."""
    with socket.socket(fileno=int(descriptor)) as link:
        link.setblocking(False)
        Sampler(link, Path(root), float(rate_hz), int(pid) or None).run()


if __name__ == "__main__":
    main(*sys.argv[1:5])
