"""Prometheus metrics. Label values come from fixed sets only: a client cannot make new ones."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fmdeploy.optional import require
from fmdeploy.runtime.frame import Frame, Reason
from fmdeploy.runtime.serve import log

BUCKETS_S = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
STATE = ("state", "mode", "tier", "provider", "bundle")


class Metrics:
    """What the server counts; one registry of its own."""

    def __init__(self) -> None:
        prometheus = require("prometheus_client")
        self.registry = prometheus.CollectorRegistry()
        prometheus.disable_created_metrics()  # a start time for every reason code
        self._encode = prometheus.generate_latest
        self.content_type: str = prometheus.CONTENT_TYPE_LATEST

        def make(kind: str, name: str, text: str, labels: tuple[str, ...] = (), **options: Any) -> Any:
            return getattr(prometheus, kind)(f"fmdeploy_{name}", text, labels, registry=self.registry, **options)

        frames = make("Counter", "frames", "Frames published", ("valid",))
        self._valid, self._invalid = frames.labels("true"), frames.labels("false")
        reasons = make("Counter", "frame_reasons", "Reason codes of published frames, warnings included", ("reason",))
        self._reasons = {reason: reasons.labels(reason.value) for reason in Reason}
        responses = make("Counter", "http_responses", "Answers by class of status", ("status",))
        self._responses = {digit: responses.labels(f"{digit}xx") for digit in range(2, 6)}
        reloads = make("Counter", "reloads", "Attempts to replace the model", ("result",))
        self.reloaded, self.reload_failed = reloads.labels("ok"), reloads.labels("failed")
        self._latency = make("Histogram", "infer_seconds", "From the runtime's taking a frame to its result",
                             buckets=BUCKETS_S)
        self._waited = make("Histogram", "queue_seconds", "Waiting for the runtime", buckets=BUCKETS_S)
        self.checked = make("Counter", "disk_checks", "Times the files were held against the model that serves")
        self.gone = make("Counter", "clients_gone", "Clients that closed the connection before their answer")
        self._lost_logs = make("Gauge", "lost_logs", "Log lines that could not be written")
        self._queue = make("Gauge", "queue_depth", "Frames that wait")
        self._dropped = make("Gauge", "dropped_frames", "Frames that a newer one pushed out of the queue")
        self._counters = make("Gauge", "runtime", "Counters of the runtime since its start", ("counter",))
        self._state = make("Info", "state", "State of the runtime")
        self._ready = make("Gauge", "ready", "1 when frames are answered")
        self._changed = make("Gauge", "model_changed", "1 when the bundle on disk is not the one that serves")
        self._completed = make("Gauge", "last_completed_seq", "Number of the last frame that was finished")
        self._resident = make("Gauge", "resident_bytes", "Resident memory of the server process")
        make("Gauge", "start_time_seconds", "When the server started").set(time.time())

    def published(self, frame: Frame, waited_ms: float | None) -> None:
        """Count one frame."""
        (self._valid if frame.valid else self._invalid).inc()
        for reason in frame.reasons:
            self._reasons[reason].inc()
        self._latency.observe(frame.latency_ms / 1e3)
        if waited_ms is not None:
            self._waited.observe(waited_ms / 1e3)

    def refused(self, reasons: tuple[Reason, ...]) -> None:
        """Count a frame that was refused before the runtime published anything for it."""
        self._invalid.inc()
        for reason in reasons:
            self._reasons[reason].inc()

    def answered(self, status: int) -> None:
        """Count one answer."""
        self._responses[status // 100].inc()

    def totals(self) -> dict[str, float]:
        """Frames by validity, and the seconds they took."""
        samples = {sample.name: sample.value for family in (self._latency, self._waited)
                   for metric in family.collect() for sample in metric.samples if sample.name.endswith("_sum")}
        return {"valid": _value(self._valid), "invalid": _value(self._invalid),
                "infer_s": samples["fmdeploy_infer_seconds_sum"], "queue_s": samples["fmdeploy_queue_seconds_sum"]}

    def page(self, *, depth: int, dropped: int, ready: bool, changed: bool, health: dict[str, Any]) -> bytes:
        """Everything as text for Prometheus."""
        self._queue.set(depth)
        self._dropped.set(dropped)
        self._ready.set(ready)
        self._changed.set(changed)
        self._completed.set(_number(health.get("last_completed_seq")))
        self._resident.set(resident_bytes())
        self._lost_logs.set(log.lost)
        for name, value in (health.get("counters") or {}).items():
            self._counters.labels(str(name)).set(_number(value))
        self._state.info({name: str(health.get(name) or "") for name in STATE})
        text: bytes = self._encode(self.registry)
        return text


def resident_bytes() -> int:
    """Resident memory of this process; 0 where /proc does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    import resource

    return pages * resource.getpagesize()


def _value(counter: Any) -> float:
    return float(next(s.value for metric in counter.collect() for s in metric.samples if s.name.endswith("_total")))


def _number(value: Any) -> float:
    return -1.0 if value is None else float(value)
