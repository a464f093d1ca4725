"""`Station`: which model serves. Loading, replacing it all or nothing, and holding it against the disk."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmdeploy.artifact import open_artifact
from fmdeploy.errors import FmdeployError
from fmdeploy.iospec import IOSpec
from fmdeploy.manifest import Kind
from fmdeploy.runtime.backends.protocol import DeviceLostError
from fmdeploy.runtime.bundle import Bundle, open_bundle
from fmdeploy.runtime.frame import Finding, Frame, Reason
from fmdeploy.runtime.health import PerceptionRuntime
from fmdeploy.runtime.loading import Terms
from fmdeploy.runtime.serve.config import ServeConfig, model_name
from fmdeploy.runtime.serve.errors import not_ready
from fmdeploy.runtime.serve.line import Job, WaitingLine
from fmdeploy.runtime.serve.log import note
from fmdeploy.runtime.serve.metrics import Metrics
from fmdeploy.runtime.serve.model import ServedModel

SETTLE_S = 0.02  # how often the event loop looks whether a model has loaded
WATCH_S = 0.1  # how often it looks whether the runtime can be trusted, and whether the disk is due
VERSION_DIGITS = 12
BUILD_TIMEOUT_MS = 1_800_000.0  # for a start that builds an engine


class Serving(NamedTuple):
    """What requests need to know of the model that serves.

    Attributes:
        bundle: Its bundle.
        io: What it takes and gives.
        version: The beginning of its bundle's digest.
        body_limit: Largest request in bytes.
    """

    bundle: Bundle
    io: IOSpec
    version: str
    body_limit: int


class Station:
    """The serving model, and the one that may follow it.

    Attributes:
        name: Name of the model in the URLs.
        line: Frames that wait.
        draining: Whether the server ends.
        changed: Why the bundle on disk is not the one that serves; empty where it is.
        failed_reload: Why the last reload failed; empty after one that did not.
    """

    def __init__(self, config: ServeConfig, metrics: Metrics) -> None:
        self.config, self.metrics = config, metrics
        self.name = model_name(config)
        self.line = WaitingLine(config.queue)
        self.draining, self.changed, self.failed_reload = False, "", ""
        self._model: ServedModel | None = None
        self._serving: Serving | None = None
        self._retired: list[ServedModel] = []
        self._reloading = asyncio.Lock()
        self._started = time.monotonic()

    @property
    def runtime(self) -> PerceptionRuntime | None:
        """The runtime that serves; None while it loads."""
        return self._model.runtime if self._model else None

    @property
    def serving(self) -> Serving:
        """What serves now.

        Raises:
            RequestError: Nothing does yet.
        """
        if self._serving is None:
            raise not_ready("the model is loading")
        return self._serving

    @property
    def body_limit(self) -> int:
        """Largest request in bytes; 0 while there is no model."""
        return self._serving.body_limit if self._serving else 0

    @property
    def tier(self) -> str:
        """The tier that serves; empty while there is none."""
        return self.runtime.tier if self.runtime else ""

    def is_ready(self) -> bool:
        """Whether frames are answered now."""
        return not self.draining and self.runtime is not None and bool(self.runtime.health().ready)

    def health(self) -> dict[str, Any]:
        """The runtime's health and the server's, as plain JSON."""
        if self.runtime is None:
            found: dict[str, Any] = {"live": True, "ready": False, "state": "LOADING"}
        else:
            found = dict(self.runtime.health().to_json())
        if self.draining:
            found |= {"ready": False, "state": "DRAINING"}
        reports = self.runtime.reports if self.runtime else ()
        found["tiers"] = [{"tier": one.tier, "admitted": one.admitted, "reason": one.reason, "note": one.note}
                          for one in reports]
        return {**found, "queued": len(self.line), "dropped": self.line.num_dropped, "model_changed": self.changed,
                "failed_reload": self.failed_reload, "server_uptime_s": round(time.monotonic() - self._started, 3)}

    def submit(self, job: Job) -> None:
        """Put a frame into the line.

        Raises:
            RequestError: Nothing takes frames now.
        """
        if self.draining:
            raise not_ready("the server is draining")
        if self.runtime is None:
            raise not_ready("the model is loading")
        if self.line.put(job) is not None:
            self.metrics.refused((Reason.DROPPED,))

    async def load(self) -> None:
        """Start the first model.

        Raises:
            FmdeployError: The bundle or the machine does not allow it.
        """
        self._take(await self._begin())

    async def reload(self) -> str:
        """Replace the model with what is at the path now; on any failure the old one keeps serving.

        Returns:
            Empty, or why it failed.
        """
        async with self._reloading:
            try:
                model = await self._begin()
            except Exception as error:  # whatever is wrong with the new one, the old one serves
                self.failed_reload = " ".join(str(error).split()) or type(error).__name__
                self.metrics.reload_failed.inc()
                note("RELOAD_FAILED", error=self.failed_reload, serving=self.serving.bundle.digest)
                return self.failed_reload
            old = self._model
            self._take(model)
            if old is not None:
                old.stop(replaced=True)
                self._retired = [one for one in (*self._retired, old) if not one.join(0)]
            self.failed_reload, self.changed = "", ""
            self.metrics.reloaded.inc()
            note("RELOADED", bundle=self.serving.bundle.digest, tier=self.tier)
            return ""

    async def check_disk(self) -> str:
        """Hold the bundle on disk against the one that serves; return how they differ."""
        bundle = self.serving.bundle
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(None, difference, bundle)
        self.metrics.checked.inc()
        if bundle is self.serving.bundle and found != self.changed:
            self.changed = found
            note(Reason.MODEL_CHANGED.value if found else "MODEL_UNCHANGED", detail=found, serving=bundle.digest)
        return found

    async def watch(self) -> None:
        """Look after the model and its files, for ever.

        Raises:
            DeviceLostError: The runtime says that its process cannot be trusted: only a new one can help.
        """
        checked = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_S)
            if self.runtime is None:
                continue
            health = self.runtime.health()
            if not health.live:
                raise DeviceLostError(f"the model cannot run in this process any more: {'; '.join(health.reasons)}",
                                      where=self.name, fix="Start the server again")
            if time.monotonic() - checked >= self.config.check_s:
                await self.check_disk()
                checked = time.monotonic()

    def close(self, timeout_s: float) -> bool:
        """Stop the models; False when one of them is stuck in a frame."""
        self.draining = True
        self.line.refuse_all(not_ready("the server is draining"))
        models = [model for model in (*self._retired, self._model) if model is not None]
        for model in models:
            model.stop()
        end = time.monotonic() + timeout_s
        ended = [model.join(max(0.0, end - time.monotonic())) for model in models]
        return all(ended)

    def _take(self, model: ServedModel) -> None:
        """Let a loaded model take frames from the line."""
        assert model.runtime is not None
        bundle = model.runtime.bundle
        self._model = model
        self._serving = Serving(bundle, bundle.io, bundle.digest[:VERSION_DIGITS], body_limit(self.config, bundle.io))
        model.serve()

    async def _begin(self) -> ServedModel:
        """Load a model in its thread; it takes no frames yet."""
        model = ServedModel(lambda: start_runtime(self.config), self.line, self._published,
                            deadline_ms=self.config.deadline_ms)
        model.begin()
        while not model.settled.is_set():
            await asyncio.sleep(SETTLE_S)
        if model.failure is not None:
            raise model.failure
        return model

    def _published(self, job: Job | None, frame: Frame) -> Frame:
        """Add what only the server knows, and count; called in the model's thread."""
        if self.changed:
            frame = replace(frame, findings=(*frame.findings, Finding(Reason.MODEL_CHANGED, self.changed)))
        self.metrics.published(frame, job.waited_ms if job else None)
        return frame


def start_runtime(config: ServeConfig) -> PerceptionRuntime:
    """Open, verify and self-test what is at the configured path now.

    Raises:
        FmdeployError: It is not what it must be.
    """
    root = Path(config.bundle).resolve()  # a link that is moved later does not change what was loaded
    bundle = open_bundle(root, require_signature=config.require_signature)
    return (supervised if config.supervisor else embedded)(config, bundle)


def supervised(config: ServeConfig, bundle: Bundle) -> PerceptionRuntime:
    """A runtime with a worker process."""
    from fmdeploy.runtime.supervisor.config import Supervision
    from fmdeploy.runtime.supervisor.supervised import SupervisedRuntime

    builds = config.engines is not None and config.build_missing
    supervision = Supervision(
        hard_deadline_ms=config.hard_deadline_ms,
        terminate_ms=min(Supervision.terminate_ms, 0.6 * config.hard_deadline_ms),
        start_timeout_ms=max(Supervision.start_timeout_ms, BUILD_TIMEOUT_MS if builds else 0.0),
    )
    return SupervisedRuntime(bundle, tiers=config.tiers, threads=config.threads, deadline_ms=config.deadline_ms,
                             standby=config.standby, terms=terms(config), supervision=supervision)


def embedded(config: ServeConfig, bundle: Bundle) -> PerceptionRuntime:
    """A runtime in this process."""
    from fmdeploy.runtime.serve.service import ServiceRuntime

    return ServiceRuntime(bundle, tiers=config.tiers, threads=config.threads, deadline_ms=config.deadline_ms,
                          standby=config.standby, terms=terms(config))


def terms(config: ServeConfig) -> Terms:
    """Where engines are, and whether they may be built."""
    return Terms(engines=config.engines, build_missing=config.engines is not None and config.build_missing)


def difference(bundle: Bundle) -> str:
    """How the files on disk differ from the bundle in memory; empty where they do not."""
    try:
        found = open_artifact(bundle.artifact.root, Kind.BUNDLE)
    except (FmdeployError, OSError) as error:
        return " ".join(str(error).split())
    return "" if found.digest == bundle.digest else f"another bundle lies there: {found.digest[:VERSION_DIGITS]}"


def body_limit(config: ServeConfig, io: IOSpec) -> int:
    """Largest request in bytes. Eight times the inputs: JSON seldom spends more than 32 characters on a float32."""
    if config.body_limit_mib is not None:
        return int(config.body_limit_mib * 1024 * 1024)
    size = sum(math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in io.inputs)
    return 8 * size + 64 * 1024
