"""One frame → the bytes of an answer. An invalid frame never looks like a valid one: it is an error of HTTP, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from pydantic_core import to_json

from fmdeploy.arrays import Array
from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.runtime.frame import WARNINGS, Frame, Reason
from fmdeploy.runtime.serve.errors import RequestError
from fmdeploy.runtime.serve.request import DATATYPE, InferRequest
from fmdeploy.runtime.state import Mode

JSON = b"application/json"
BINARY = b"application/octet-stream"

# What the client sent is at fault: sending it again does not help.
CONTENT = frozenset({
    Reason.NOT_FINITE, Reason.OUT_OF_RANGE, Reason.LOW_INFORMATION, Reason.FROZEN, Reason.TORN, Reason.SENSOR_MISSING,
    Reason.OUT_OF_DISTRIBUTION, Reason.STALE, Reason.BAD_STAMP,
})
# The model itself failed on this frame.
MODEL = frozenset({Reason.BACKEND_ERROR, Reason.NOT_FINITE_OUTPUT})


class Reply(NamedTuple):
    """Status, headers without content-length, and body."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


def json_reply(status: int, value: Any, headers: tuple[tuple[bytes, bytes], ...] = ()) -> Reply:
    """Answer with JSON."""
    return Reply(status, ((b"content-type", JSON), *headers), to_json(value, inf_nan_mode="null"))


def error_reply(error: RequestError) -> Reply:
    """Answer with `{"error": …}`, the reason codes beside it and in the header Fmdeploy-Reasons."""
    codes = [reason.value for reason in error.reasons]
    headers: tuple[tuple[bytes, bytes], ...] = ((b"fmdeploy-reasons", ",".join(codes).encode()),) if codes else ()
    if error.status in (503, 429):
        headers = (*headers, (b"retry-after", b"1"))
    if error.status in (408, 413, 431):
        headers = (*headers, (b"connection", b"close"))
    body = {"error": error.text, **({"reasons": codes} if codes else {}), **error.facts}
    return json_reply(error.status, body, headers)


def status_of(reasons: tuple[Reason, ...]) -> int:
    """The HTTP status of an invalid frame: 503 try again, 500 the model failed, 422 send something better."""
    fatal = {reason for reason in reasons if reason not in WARNINGS}
    if fatal - CONTENT - MODEL or not fatal:
        return 503
    return 500 if fatal & MODEL else 422


def invalid(frame: Frame, parameters: Mapping[str, Any]) -> RequestError:
    """The error that an invalid frame is."""
    text = "; ".join(f"{found.code.value} {found.detail}" for found in frame.findings)
    return RequestError(status_of(frame.reasons), f"frame {frame.seq} is not valid: {text}"[:2000],
                        reasons=frame.reasons, facts={"parameters": parameters})


def parameters_of(frame: Frame, waited_ms: float, *, stamped: bool) -> dict[str, Any]:
    """Everything but the outputs, as the scalars that KServe allows in `parameters`.

    Args:
        frame: What the runtime published.
        waited_ms: How long the frame waited for the runtime.
        stamped: Whether the client stamped it; otherwise its age starts when its request was complete.
    """
    reasons = dict.fromkeys(reason.value for reason in frame.reasons)
    found: dict[str, Any] = {
        "valid": frame.valid,
        "reasons": ",".join(reasons),
        "details": "; ".join(finding.detail for finding in frame.findings),
        "seq": frame.seq,
        "stamp_ns": frame.stamp_ns,
        "published_ns": frame.published_ns,
        "age_ms": round(frame.age_ms + (0.0 if stamped else waited_ms), 3),
        "latency_ms": round(frame.latency_ms, 3),
        "queue_ms": round(waited_ms, 3),
        "tier": frame.tier,
        "provider": frame.provider,
        "state": frame.state,
        "mode": frame.mode,
        "bundle": frame.bundle,
        "model_sha256": frame.model,
    }
    if frame.deadline_ms is not None:
        found["deadline_ms"] = frame.deadline_ms
    found |= {f"score.{name}": round(value, 4) for name, value in frame.scores.items()}
    found |= {f"counter.{name}": value for name, value in frame.counters.items()}
    return found


def infer_reply(
    model: tuple[str, str], io: IOSpec, request: InferRequest, frame: Frame, parameters: Mapping[str, Any]
) -> Reply:
    """Answer with the outputs that were asked for; without any where the frame has none to be used.

    What the model made of a frozen or empty picture is for those who embed the runtime and study it. Over HTTP an
    invalid frame has outputs only in mode D3, where they are an old valid frame's, or those of a frame on probation.

    Args:
        model: Name and version.
        io: What the outputs are.
        request: What was asked.
        frame: The answer.
        parameters: See `parameters_of`.
    """
    specs = {spec.name: spec for spec in io.outputs}
    wanted = request.outputs or tuple((name, request.binary) for name in specs)
    listed: list[dict[str, Any]] = []
    blobs: list[memoryview] = []
    shown = frame.outputs if frame.valid or frame.mode == Mode.D3.label else {}
    for name, binary in wanted if shown else ():
        array = np.ascontiguousarray(shown[name])
        listed.append(_output(specs[name], array, blobs if binary else None))
    root: dict[str, Any] = {"model_name": model[0], "model_version": model[1], "outputs": listed,
                            "parameters": parameters}
    if request.id:
        root["id"] = request.id
    head = to_json(root, inf_nan_mode="null")
    if not blobs:
        return Reply(200, ((b"content-type", JSON),), head)
    length = (b"inference-header-content-length", str(len(head)).encode())
    return Reply(200, ((b"content-type", BINARY), length), b"".join((head, *blobs)))


def _output(spec: TensorSpec, array: Array, blobs: list[memoryview] | None) -> dict[str, Any]:
    found: dict[str, Any] = {"name": spec.name, "datatype": DATATYPE[spec.dtype], "shape": [1, *array.shape]}
    if blobs is None:
        found["data"] = array.reshape(-1).tolist()
    else:
        found["parameters"] = {"binary_data_size": array.nbytes}
        blobs.append(array.reshape(-1).view(np.uint8).data)
    return found
