"""The URLs, as one ASGI application: infer on the shortest way, everything else through starlette's routes."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

from fmdeploy.optional import require
from fmdeploy.runtime.serve.body import (
    ClientGone,
    Receive,
    Scope,
    Send,
    discard,
    headers_of,
    pack,
    read_body,
    unpack,
)
from fmdeploy.runtime.serve.describe import model_config, model_metadata, server_metadata, statistics
from fmdeploy.runtime.serve.errors import RequestError, not_ready
from fmdeploy.runtime.serve.line import Job
from fmdeploy.runtime.serve.log import note
from fmdeploy.runtime.serve.metrics import Metrics
from fmdeploy.runtime.serve.reply import Reply, error_reply, infer_reply, invalid, json_reply, parameters_of
from fmdeploy.runtime.serve.request import InferRequest, is_short, parse_infer
from fmdeploy.runtime.serve.station import Station

LINGER_BYTES = 8 * 1024 * 1024
ANY_VERSION = "1"  # what clients of other servers write
Answer = Callable[[], Awaitable[Reply] | Reply]


class Application:
    """KServe v2 around a station."""

    def __init__(self, station: Station, metrics: Metrics) -> None:
        self.station, self.metrics = station, metrics
        self._infer_path = f"/v2/models/{station.name}/infer"
        self._routes = self._starlette()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        if scope["method"] == "POST" and scope["path"].endswith("/infer"):
            await self._answer_infer(scope, receive, send)
        else:
            await self._routes(scope, receive, send)

    async def _answer_infer(self, scope: Scope, receive: Receive, send: Send) -> None:
        linger = False
        try:
            reply = await self._infer(scope, receive)
        except RequestError as error:
            reply, linger = error_reply(error), error.status == 413
        except ClientGone:
            self.metrics.gone.inc()
            return
        except asyncio.CancelledError:  # the grace time of a shutdown is over
            reply = error_reply(not_ready("the server is draining"))
        except Exception as error:  # a bug is one failed request
            reply = _bug(error)
        connection = scope.get("state", {}).get("connection")
        if connection is not None and connection.is_gone():
            self.metrics.gone.inc()
            return
        self.metrics.answered(reply.status)
        await _send(send, reply, more=linger)
        if linger:  # closing at once would reset the connection, and the client would not see why
            await discard(receive, LINGER_BYTES)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _infer(self, scope: Scope, receive: Receive) -> Reply:
        station = self.station
        if scope["path"] != self._infer_path:
            self._require_model(scope["path"].removesuffix("/infer"))
        bundle, io, version, limit = station.serving
        headers = headers_of(scope)
        if station.draining:
            raise not_ready("the server is draining")
        state = scope.get("state", {})
        body = await read_body(headers, receive, limit, state.get("cycle"))
        request = await self._parse(io, headers, body, limit)
        connection = state.get("connection")
        job = Job(request, asyncio.get_running_loop().create_future(), connection.is_gone if connection else _never)
        station.submit(job)
        try:
            frame = await job.answer
        except RequestError as error:
            if error.reasons and not job.started_ns:
                error.facts.setdefault("queue", station.line.size)
            raise
        parameters = parameters_of(frame, job.waited_ms, stamped=request.stamp_ns is not None)
        if not frame.valid and not request.allow_invalid:
            raise invalid(frame, parameters)
        if frame.bundle != bundle.digest and station.serving.io != io:
            raise not_ready("the model was replaced by one with other inputs or outputs while this frame waited")
        version = frame.bundle[: len(version)]  # of the model that ran
        return _packed(infer_reply((station.name, version), io, request, frame, parameters), headers)

    async def _parse(self, io: Any, headers: dict[bytes, bytes], body: bytes | bytearray, limit: int) -> InferRequest:
        """Binary requests are parsed here, in microseconds; others in a thread, since they may take long."""
        encoding = headers.get(b"content-encoding", b"").strip().lower()
        if is_short(headers) and not encoding:
            return parse_infer(io, headers, body)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, lambda: parse_infer(io, headers, unpack(body, encoding, limit)))

    def _require_model(self, path: str) -> None:
        """Check `/v2/models/M[/versions/V]`, given as a path or as starlette's parameters."""
        parts = path.removeprefix("/v2/models/").split("/")
        fits = len(parts) == 1 or (len(parts) == 3 and parts[1] == "versions")
        if not path.startswith("/v2/models/") or not fits:
            raise RequestError(404, "no such address")
        self._require_version(parts[0], parts[2] if len(parts) == 3 else "")

    def _require_version(self, name: str, version: str) -> None:
        if name != self.station.name:
            raise RequestError(404, f"unknown model {name[:64]!r}; here is {self.station.name!r}")
        if version not in ("", ANY_VERSION, self.station.serving.version):
            raise RequestError(404, f"unknown version {version[:64]!r}; here is {self.station.serving.version!r}")

    # Everything but infer

    def _starlette(self) -> Any:
        names = ("applications", "routing", "exceptions")
        applications, routing, exceptions = (require(f"starlette.{name}") for name in names)
        routes = [
            ("/v2", "GET", self._server), ("/v2/health/live", "GET", self._live),
            ("/v2/health/ready", "GET", self._ready), ("/health", "GET", self._health),
            ("/metrics", "GET", self._metrics_page), ("/v2/models/stats", "GET", self._statistics),
            ("/v2/repository/index", "POST", self._index), ("/v2/repository/models/{name}/load", "POST", self._load),
        ]
        for base in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
            routes += [(base, "GET", self._metadata), (f"{base}/ready", "GET", self._ready),
                       (f"{base}/infer", "POST", self._metadata),  # GET is 405; POST never comes here
                       (f"{base}/config", "GET", self._config), (f"{base}/stats", "GET", self._statistics)]
        handlers = {exceptions.HTTPException: _http_error, RequestError: _request_error, Exception: _any_error}
        return applications.Starlette(
            routes=[routing.Route(path, self._endpoint(handler), methods=[method]) for path, method, handler in routes],
            exception_handlers=handlers,
        )

    def _endpoint(self, handler: Callable[[Any], Any]) -> Callable[[Any], Awaitable[Any]]:
        async def endpoint(request: Any) -> Any:
            found = request.path_params
            if "name" in found:
                self._require_version(found["name"], found.get("version", ""))
            reply = handler(request)
            reply = await reply if asyncio.iscoroutine(reply) else reply
            self.metrics.answered(reply.status)
            return _response(reply)

        return endpoint

    def _server(self, _: Any) -> Reply:
        return json_reply(200, server_metadata(reload=self.station.config.allow_reload))

    def _live(self, _: Any) -> Reply:
        return json_reply(200, {"live": True})

    def _ready(self, _: Any) -> Reply:
        if self.station.is_ready():
            return json_reply(200, {"ready": True})
        health = self.station.health()
        reasons = health.get("reasons") or []
        return json_reply(503, {"error": f"not ready: {health['state']}", "ready": False, "state": health["state"],
                                "reasons": list(reasons)})

    def _health(self, _: Any) -> Reply:
        health = self.station.health()
        return json_reply(200 if self.station.is_ready() else 503, health)

    def _metadata(self, _: Any) -> Reply:
        return json_reply(200, model_metadata(self.station))

    def _config(self, _: Any) -> Reply:
        return json_reply(200, model_config(self.station))

    def _statistics(self, _: Any) -> Reply:
        return json_reply(200, statistics(self.station, self.metrics))

    def _index(self, _: Any) -> Reply:
        ready = self.station.is_ready()
        return json_reply(200, [{"name": self.station.name, "version": self.station.serving.version,
                                 "state": "READY" if ready else "UNAVAILABLE", "reason": self.station.failed_reload}])

    async def _load(self, _: Any) -> Reply:
        if not self.station.config.allow_reload:
            raise RequestError(403, "reload over HTTP is off; send SIGHUP, or start with --allow-reload")
        note("RELOAD_ASKED", by="http")
        if reason := await self.station.reload():
            raise RequestError(400, f"failed to load {self.station.name!r}, the old model serves on: {reason}")
        return json_reply(200, {})

    def _metrics_page(self, _: Any) -> Reply:
        station = self.station
        text = self.metrics.page(depth=len(station.line), dropped=station.line.num_dropped, ready=station.is_ready(),
                                 changed=bool(station.changed), health=station.health())
        return Reply(200, ((b"content-type", self.metrics.content_type.encode()),), text)


def _packed(reply: Reply, headers: dict[bytes, bytes]) -> Reply:
    accepted = headers.get(b"accept-encoding", b"")
    if not accepted:
        return reply
    body, encoding = pack(reply.body, accepted)
    return Reply(reply.status, (*reply.headers, (b"content-encoding", encoding)), body) if encoding else reply


async def _send(send: Send, reply: Reply, *, more: bool = False) -> None:
    headers = [*reply.headers, (b"content-length", b"%d" % len(reply.body))]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body, "more_body": more})


def _never() -> bool:
    return False


def _response(reply: Reply) -> Any:
    responses = require("starlette.responses")
    headers = {name.decode(): value.decode() for name, value in reply.headers}
    return responses.Response(reply.body, reply.status, headers)


async def _http_error(_: Any, error: Any) -> Any:
    return _response(json_reply(error.status_code, {"error": str(error.detail)}))


async def _request_error(_: Any, error: Any) -> Any:
    return _response(error_reply(error))


async def _any_error(_: Any, error: Exception) -> Any:
    return _response(_bug(error))


def _bug(error: Exception) -> Reply:
    """Nothing of a traceback goes to a client; the log has it."""
    note("BUG", error="".join(traceback.format_exception(error)))
    return json_reply(500, {"error": f"a bug in the server: {type(error).__name__}; its log has more"})
