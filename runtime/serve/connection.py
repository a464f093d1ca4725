"""Limits of one connection that uvicorn does not have: size of the headers, time for a request, number of connections.

A request line and headers of any length would otherwise be collected in memory, and a client that sends one byte a
minute would hold its connection for ever.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fmdeploy.optional import require

HEADER_BYTES = 32 * 1024
HEADER_COUNT = 100


@dataclass(frozen=True)
class Limits:
    """What one client may take.

    Attributes:
        connections: Connections at a time, over all clients.
        read_timeout_s: From the first byte of a request, or the connection, to its last byte.
        body_bytes: Bodies of at most this size are collected as they come; reading of others stops until the
            application asks for more.
    """

    connections: int
    read_timeout_s: float
    body_bytes: Callable[[], int]


def bounded_protocol(limits: Limits) -> type[Any]:
    """Return uvicorn's protocol class with these limits."""
    base = require("uvicorn.protocols.http.httptools_impl").HttpToolsProtocol

    class BoundedProtocol(base):  # type: ignore[misc, valid-type]
        """One connection."""

        _timer: Any = None
        _header_bytes = 0
        _wanted = False
        _heard = False  # the parser told of something in the data at hand
        _swallowed = 0  # bytes since it last did: it collects a header, a trailer or a chunk extension of any length

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                self._refuse(503, "too many connections", b"retry-after: 1\r\n")
            else:
                self._arm()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            if self._timer is None:  # also for empty lines between two requests, which begin none
                self._arm()
            self._heard = False
            super().data_received(data)
            self._swallowed = 0 if self._heard else self._swallowed + len(data)
            if self._swallowed > HEADER_BYTES:
                self._refuse(431, "the request line and headers are too large")

        def on_message_begin(self) -> None:
            self._heard = True
            super().on_message_begin()
            self.scope["state"]["connection"] = self
            self._header_bytes = 0
            self._arm()  # anew: the time counts from the first byte of this request

        def on_url(self, url: bytes) -> None:
            super().on_url(url)
            self._count(len(url))

        def on_header(self, name: bytes, value: bytes) -> None:
            self._heard = True
            super().on_header(name, value)
            self._count(len(name) + len(value))

        def on_headers_complete(self) -> None:
            if not self.transport.is_closing():
                length = next((value for name, value in self.headers if name == b"content-length"), b"0")
                self._wanted = length.isdigit() and 0 < int(length[:20]) <= limits.body_bytes()
                super().on_headers_complete()
                if self._wanted:
                    self.scope["state"]["cycle"] = self.cycle

        def on_body(self, body: bytes) -> None:
            self._heard = True
            if self.cycle is None or self.transport.is_closing():
                return
            if self._wanted and not self.cycle.response_complete:  # collect it without a wake-up for every piece
                self.cycle.body += body
            else:
                super().on_body(body)

        def on_message_complete(self) -> None:
            self._heard = True
            self._disarm()
            if self.cycle is not None and not self.transport.is_closing():
                super().on_message_complete()

        def is_gone(self) -> bool:
            """Whether nobody waits for an answer any more."""
            return bool(self.transport.is_closing())

        def _count(self, size: int) -> None:
            self._header_bytes += size
            if self._header_bytes > HEADER_BYTES or len(self.headers) > HEADER_COUNT:
                self._refuse(431, "the request line and headers are too large")

        def _arm(self) -> None:
            self._disarm()
            self._timer = self.loop.call_later(limits.read_timeout_s, self._too_slow)

        def _disarm(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _too_slow(self) -> None:
            self._refuse(408, f"no complete request within {limits.read_timeout_s:g} s")

        def _refuse(self, status: int, text: str, headers: bytes = b"") -> None:
            """Answer if no answer has begun, and close."""
            if self.transport.is_closing():
                return
            if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
                body = json.dumps({"error": text}).encode()
                head = b"HTTP/1.1 %d -\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n"
                self.transport.write(head % (status, len(body)) + headers + b"\r\n" + body)
            self.transport.close()

    return BoundedProtocol
