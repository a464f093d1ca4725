"""Request bodies: bounded while they arrive, and again while they are unpacked."""

from __future__ import annotations

import zlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fmdeploy.runtime.serve.errors import RequestError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

WINDOW = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}


class ClientGone(Exception):
    """The client closed the connection; nobody waits for an answer."""


def headers_of(scope: Scope) -> dict[bytes, bytes]:
    """Return the headers by lower-case name.

    Raises:
        RequestError: A header that decides how the body is read comes twice: proxies disagree on which one counts.
    """
    found: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        if name in found and name in (b"content-length", b"content-encoding", b"inference-header-content-length"):
            raise RequestError(400, f"the header {name.decode()} comes twice")
        found[name] = value
    return found


async def read_body(
    headers: dict[bytes, bytes], receive: Receive, limit: int, cycle: Any = None
) -> bytes | bytearray:
    """Read one body; a larger one is refused before it is read, or as soon as it passes the limit.

    Args:
        headers: The request's.
        receive: ASGI's.
        limit: Largest size in bytes.
        cycle: uvicorn's object, where the connection collects the body in it: saves copies and wake-ups.

    Raises:
        RequestError: It is too large.
        ClientGone: The client went away.
    """
    if not headers.get(b"content-length", b"0").isdigit():
        raise RequestError(400, "Content-Length is no number")
    length = int(headers.get(b"content-length", b"0"))
    if length > limit:
        raise too_large(limit)
    if cycle is not None and not cycle.waiting_for_100_continue:
        return await _collected(cycle)
    message = await receive()
    if not message.get("more_body") and message["type"] == "http.request":
        return bytes(message["body"])
    body = bytearray()
    while True:
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message["body"]
        if len(body) > limit:
            raise too_large(limit)
        if not message["more_body"]:
            return body
        message = await receive()


async def _collected(cycle: Any) -> bytearray:
    while cycle.more_body and not cycle.disconnected:
        await cycle.message_event.wait()
        cycle.message_event.clear()
    if cycle.disconnected:
        raise ClientGone
    body: bytearray = cycle.body
    cycle.body = bytearray()
    return body


async def discard(receive: Receive, limit: int) -> None:
    """Read and forget a little more, so that a client in the middle of sending gets to see why it is refused."""
    seen = 0
    while seen < limit:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return
        seen += len(message["body"])


def unpack(body: bytes | bytearray, encoding: bytes, limit: int) -> bytes | bytearray:
    """Undo Content-Encoding.

    Raises:
        RequestError: The encoding is unknown, the body broken, or larger than `limit` when unpacked.
    """
    if not encoding or encoding == b"identity":
        return body
    window = WINDOW.get(encoding)
    if window is None:
        raise RequestError(415, f"Content-Encoding {encoding.decode('latin-1')!r} is not gzip, deflate or identity")
    unpacker = zlib.decompressobj(window)
    try:
        plain = unpacker.decompress(body, limit + 1)
    except zlib.error as error:
        raise RequestError(400, f"the body is not {encoding.decode()}: {error}") from error
    if len(plain) > limit:
        raise too_large(limit)
    if not unpacker.eof or unpacker.unused_data:
        raise RequestError(400, f"the {encoding.decode()} body is cut off, or more follows it")
    return plain


def pack(body: bytes, accepted: bytes) -> tuple[bytes, bytes]:
    """Compress an answer for a client that accepts it; return it and its encoding."""
    names = {part.partition(b";")[0].strip() for part in accepted.split(b",") if b"q=0" not in part.replace(b" ", b"")}
    for name in (b"gzip", b"deflate"):
        if name in names:
            packer = zlib.compressobj(1, zlib.DEFLATED, WINDOW[name])
            return packer.compress(body) + packer.flush(), name
    return body, b""


def too_large(limit: int) -> RequestError:
    """The body passes the limit."""
    return RequestError(413, f"the request is larger than {limit} bytes, the limit of this server")
