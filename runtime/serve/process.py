"""The server process: the socket first, HTTP before the model, READY when the model is, and a clean end."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from contextlib import nullcontext, suppress
from typing import Any

from fmdeploy.optional import require
from fmdeploy.runtime.serve import log
from fmdeploy.runtime.serve.address import Listener, listen
from fmdeploy.runtime.serve.app import Application
from fmdeploy.runtime.serve.board import BoardWatch
from fmdeploy.runtime.serve.config import DEFAULT_HTTP, ServeConfig
from fmdeploy.runtime.serve.connection import Limits, bounded_protocol
from fmdeploy.runtime.serve.metrics import Metrics
from fmdeploy.runtime.serve.station import Station

CLOSE_S = 2.0  # for a runtime to close, after the last frame's hard deadline
KEEP_ALIVE_S = 75


def serve_until_stopped(config: ServeConfig) -> None:
    """Listen, load, tell that it is ready, and serve until SIGTERM or SIGINT.

    Raises:
        FmdeployError: The address is not to be had, or the model does not start.
    """
    for name in ("uvicorn", "starlette", "prometheus_client", "httptools"):
        require(name)  # say what is missing before anything is bound
    http = config.http or ("" if config.unix else DEFAULT_HTTP)
    listener = listen(http, config.unix, allow_remote=config.allow_remote)
    loop = _new_loop()
    try:
        asyncio.set_event_loop(loop)
        finished = loop.run_until_complete(_serve(config, listener))
    finally:
        listener.remove()
        listener.socket.close()
        asyncio.set_event_loop(None)
        loop.close()
    if not finished:  # a run that cannot be interrupted: nothing is published any more, and nobody waits for it
        log.note("STUCK", detail="the model did not finish its frame within the grace time")
        os._exit(0)


async def _serve(config: ServeConfig, listener: Listener) -> bool:
    """Serve; return whether every thread ended."""
    metrics = Metrics()
    station = Station(config, metrics)
    server = _uvicorn(station, Application(station, metrics))
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[Any]] = set()

    def begin(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = loop.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return task

    def stop() -> None:
        if not station.draining:
            log.note("DRAINING", queued=len(station.line))
        station.draining = server.should_exit = True

    def reload() -> None:
        if station.runtime is not None and not station.draining:
            log.note("RELOAD_ASKED", by="SIGHUP")
            begin(station.reload())

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, reload)
    starting = begin(_start(config, station, listener, stop))
    board = BoardWatch(lambda: station.runtime)
    board.begin()
    await server.serve(sockets=[listener.socket])
    board.close()
    finished = station.close(CLOSE_S + config.hard_deadline_ms / 1000)
    for task in list(tasks):
        if task is not starting:
            task.cancel()
    log.note("STOPPED", finished=finished, **{k: int(v) for k, v in metrics.totals().items() if k.endswith("valid")})
    if starting.done() and not starting.cancelled() and starting.exception() is not None:
        raise starting.exception()  # type: ignore[misc]
    starting.cancel()
    return finished


async def _start(config: ServeConfig, station: Station, listener: Listener, stop: Callable[[], None]) -> None:
    """Load the model and say so; then watch it and its files. Without a model there is nothing to serve.

    Raises:
        FmdeployError: It does not load, or its process cannot be trusted any more.
    """
    try:
        await station.load()
        if station.draining:
            return
        line = {"model": station.name, "address": listener.address, "tier": station.tier, "pid": os.getpid()}
        with suppress(OSError):  # whoever started the server need not listen any more
            print(json.dumps(line), flush=True)
        log.note("READY", **line, bundle=station.serving.bundle.digest, supervisor=config.supervisor)
        await station.watch()
    finally:
        stop()


def _uvicorn(station: Station, app: Application) -> Any:
    uvicorn, config = require("uvicorn"), station.config
    limits = Limits(config.connections, config.read_timeout_s, lambda: station.body_limit)

    class Server(uvicorn.Server):  # type: ignore[misc, name-defined]
        """uvicorn without its signal handlers: they end the process by the signal, and a drained server exits 0."""

        def capture_signals(self) -> Any:
            return nullcontext()

    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # its warnings let any client fill the log
    options = uvicorn.Config(
        app, http=bounded_protocol(limits), ws="none", lifespan="off",
        log_config=None, access_log=False, proxy_headers=False, server_header=False, date_header=False,
        timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=max(1, round(config.grace_s)),
    )
    return Server(options)


def _new_loop() -> asyncio.AbstractEventLoop:
    """Take uvloop where it is installed: it is faster, and nothing else."""
    if "uvloop" not in sys.modules:
        with suppress(ImportError):
            require("uvloop")
    uvloop = sys.modules.get("uvloop")
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop() if uvloop else asyncio.new_event_loop()
    return loop
