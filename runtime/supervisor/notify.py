"""What systemd hears of a service: READY=1, WATCHDOG=1, STOPPING=1, STATUS=, as datagrams (sd_notify(3)).

The watchdog is kicked where a frame or a self-test was *completed*, never by a timer: a process whose inference hangs
must look dead. Whoever listens may go away; that is counted and nothing else.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

# Completed frames kick at most four times a watchdog interval; systemd asks for at least twice.
KICKS_AN_INTERVAL = 4


class Notifier:
    """A datagram socket to the service manager, if there is one.

    Attributes:
        interval_ns: Time after which the service manager kills without a kick; 0: no watchdog.
        num_errors: Datagrams that could not be delivered.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        """Read NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID; without them every call does nothing."""
        self.num_errors, self._kicked_ns = 0, 0
        self._address, self._socket = _address(environ.get("NOTIFY_SOCKET", "")), None
        if self._address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self.interval_ns = _interval_ns(environ) if self._socket else 0

    def ready(self, status: str) -> None:
        """Tell that the service answers: after the self-test, not before."""
        self._send(f"READY=1\nSTATUS={_line(status)}")

    def stopping(self) -> None:
        """Tell that the service ends on purpose."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """Tell people what the service is doing, in one line."""
        self._send(f"STATUS={_line(text)}")

    def progress(self) -> None:
        """Kick the watchdog if a kick is due: something was completed just now."""
        if not self.interval_ns:
            return
        now = time.monotonic_ns()
        if now - self._kicked_ns >= self.interval_ns // KICKS_AN_INTERVAL:
            self._kicked_ns = now
            self._send("WATCHDOG=1")

    def close(self) -> None:
        """Give the socket back."""
        if self._socket is not None:
            self._socket.close()
            self._socket, self.interval_ns = None, 0

    def _send(self, text: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendto(text.encode("utf-8", "replace"), self._address)
        except OSError:  # nobody listens, or its queue is full: inference goes on
            self.num_errors += 1


def _address(text: str) -> str:
    if text.startswith("@"):
        return "\0" + text[1:]
    return text if text.startswith("/") else ""


def _interval_ns(environ: Mapping[str, str]) -> int:
    """The watchdog's interval, if it is meant for this process."""
    microseconds, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not microseconds.isdecimal() or (pid and pid != str(os.getpid())):
        return 0
    return int(microseconds) * 1000


def _line(text: str) -> str:
    return " ".join(text.split())
