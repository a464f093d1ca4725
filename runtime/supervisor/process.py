"""One worker process as its parent sees it: started by exec, killed by SIGKILL, never waited for without a bound."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Sequence
from typing import Any

from fmdeploy.arrays import Arrays
from fmdeploy.iospec import IOSpec
from fmdeploy.runtime.frame import Reason
from fmdeploy.runtime.inference import Result
from fmdeploy.runtime.supervisor import notes
from fmdeploy.runtime.supervisor.channel import Channel, make_memory
from fmdeploy.runtime.supervisor.notes import Setup
from fmdeploy.runtime.supervisor.worker import MAX_PACKET

NS_PER_MS = 1_000_000
COMMAND = (sys.executable, "-m", "fmdeploy.runtime.supervisor.worker")


class WorkerLostError(Exception):
    """No result will come from this worker: it is dead, or was killed for not answering.

    Attributes:
        code: WORKER_LOST, or LATE where it had to be killed at the hard deadline.
    """

    def __init__(self, code: Reason, detail: str) -> None:
        super().__init__(detail)
        self.code, self.detail = code, detail


class WorkerProcess:
    """A worker from its start to its end.

    Attributes:
        pid: Of the process.
        ready: What it said when it had admitted a tier; None before.
        failed: Why it could not; None unless it said so.
        lost: Why nothing more is expected of it; empty while it may serve.
        started_ns: When it was started.
    """

    def __init__(self, setup: Setup, io: IOSpec, command: Sequence[str] = COMMAND) -> None:
        """Start it; it loads in the background. `take_news` tells when it is ready."""
        self.ready: dict[str, Any] | None = None
        self.failed: dict[str, Any] | None = None
        self.lost = ""
        self.started_ns = time.monotonic_ns()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        alive, self._lifeline = os.pipe()
        memory = make_memory(io)
        try:
            self.channel = Channel(io, memory, ours)
            self._process = _spawn(command, memory, theirs.fileno(), alive)
        except BaseException:
            ours.close()
            os.close(self._lifeline)
            raise
        finally:
            theirs.close()
            os.close(alive)
            os.close(memory)
        self.pid, self._reap = self._process.pid, threading.Lock()
        ours.setblocking(False)
        self._poll = select.poll()
        self._poll.register(ours, select.POLLIN)
        try:
            ours.send(setup.encode())
        except OSError as error:  # it died within its first instructions
            self.lose(f"the worker died at once: {error.strerror}")

    def run(self, seq: int, inputs: Arrays, *, missing: Collection[str], refused: bool, until_ns: int) -> Result:
        """Have one frame run.

        Args:
            seq: Its number.
            inputs: Inputs whose structure was checked.
            missing: Inputs whose sensor is not there.
            refused: Judge its content, do not run it.
            until_ns: Monotonic time at which the worker is killed.

        Raises:
            WorkerLostError: There is no result, and there will be none.
        """
        channel = self.channel
        channel.frames.write(seq, self.started_ns, inputs, notes.encode_request(missing, refused))
        self._send(notes.number(notes.RUN, seq))
        while True:
            packet = self._receive(until_ns)
            if packet[:1] == notes.DONE and notes.NUMBER.unpack(packet)[1] == seq:
                break
        slot = channel.results.read(seq)
        if slot is None:
            raise self._kill(Reason.WORKER_LOST, "the worker's result was torn")
        return notes.decode_result(slot.notes, slot.arrays)

    def ask(self, question: dict[str, Any], until_ns: int) -> dict[str, Any]:
        """Have the worker do something that is not a frame.

        Raises:
            WorkerLostError: It did not answer in time, and was killed.
        """
        self._send(notes.text(notes.ASK, question))
        while True:
            packet = self._receive(until_ns)
            if packet[:1] == notes.ANSWER:
                answer: dict[str, Any] = json.loads(packet[1:])
                return answer

    def take_news(self, wait_ms: float = 0.0) -> bool:
        """See whether a loading worker is ready or has failed; return whether it is ready now."""
        if self.ready is None and not self.lost and self._poll.poll(wait_ms):
            packet = self._packet()
            if packet[:1] == notes.READY:
                self.ready = json.loads(packet[1:])
            elif packet[:1] == notes.FAILED:
                self.failed = json.loads(packet[1:])
                self.lose(f"the worker cannot start: {self.failed and self.failed['error']}")
            elif not packet:
                self.lose(f"the worker ended while it loaded: {self.exit_text()}")
        return self.ready is not None and not self.lost

    def lose(self, why: str) -> None:
        """Kill it, and expect nothing more of it."""
        self.lost = self.lost or why
        self.kill()

    def kill(self) -> None:
        """Send SIGKILL; a dead process does not mind."""
        with self._reap:  # a reaped number may belong to somebody else
            if self._process.poll() is None:
                self._process.kill()

    def hang_up(self) -> None:
        """Ask it to end after the frame it runs, if any."""
        with contextlib.suppress(OSError):  # it is dead already
            self.channel.doorbell.send(notes.STOP)

    def wait(self, seconds: float) -> int | None:
        """Return the exit status once it has ended; None when it has not within the time."""
        end = time.monotonic() + seconds
        while (code := self.exit_code()) is None and time.monotonic() < end:
            time.sleep(0.002)
        return code

    def exit_code(self) -> int | None:
        """Exit status, negative for a signal; None while it lives."""
        with self._reap:
            return self._process.poll()

    def exit_text(self) -> str:
        """How it ended, in words."""
        code = self.wait(0.05)  # the socket closes a moment before the process can be reaped
        if code is None:
            return "it has not ended"
        return f"exit code {code}" if code >= 0 else f"signal {_signal_name(-code)}"

    def close(self) -> None:
        """Kill it if it lives, reap it and give its descriptors back."""
        self.kill()
        self.wait(1.0)
        self.channel.close()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    def _send(self, packet: bytes) -> None:
        try:
            self.channel.doorbell.send(packet)
        except OSError:
            raise self._kill(Reason.WORKER_LOST, f"the worker is gone: {self.exit_text()}") from None

    def _receive(self, until_ns: int) -> bytes:
        wait_ms = (until_ns - time.monotonic_ns()) / NS_PER_MS
        if wait_ms <= 0 or not self._poll.poll(wait_ms):
            raise self._kill(Reason.LATE, "no result at the hard deadline; the worker was killed")
        packet = self._packet()
        if not packet:
            raise self._kill(Reason.WORKER_LOST, f"the worker died: {self.exit_text()}")
        return packet

    def _packet(self) -> bytes:
        try:
            return self.channel.doorbell.recv(MAX_PACKET)
        except OSError:  # reset: its end was closed with packets unread
            return b""

    def _kill(self, code: Reason, detail: str) -> WorkerLostError:
        self.lose(detail)
        return WorkerLostError(code, detail)


def _spawn(command: Sequence[str], *descriptors: int) -> subprocess.Popen[bytes]:
    """Start the worker in a session of its own, so that Ctrl-C reaches only its parent; its output is our stderr."""
    return subprocess.Popen([*command, *map(str, descriptors)], stdin=subprocess.DEVNULL, stdout=_stderr(),
                            pass_fds=descriptors, start_new_session=True)


def _stderr() -> int:
    try:
        os.fstat(2)
    except OSError:
        return subprocess.DEVNULL
    return 2


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
