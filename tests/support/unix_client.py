"""KServe v2 in binary over a Unix socket, as a small client of another program would speak it."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np

from fmdeploy.jetson.container.healthcheck import UnixConnection
from support.bundles import Arrays

DTYPE = {"FP32": np.float32}


class Answer(NamedTuple):
    """What came back."""

    status: int
    body: dict[str, Any]
    outputs: Arrays

    @property
    def told(self) -> dict[str, Any]:
        """Validity, tier, state and the like; of an error, too."""
        parameters: dict[str, Any] = self.body.get("parameters", {})
        return parameters


def get(socket: str, path: str, timeout_s: float = 60.0) -> tuple[int, Any]:
    """Status and JSON of GET `path`."""
    connection = UnixConnection(socket, timeout_s)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def infer(socket: str, inputs: Arrays, *, model: str = "bundle", timeout_s: float = 60.0) -> Answer:
    """Send one frame in binary, read the outputs in binary."""
    raw = {name: np.ascontiguousarray(array).tobytes() for name, array in inputs.items()}
    head = json.dumps({
        "inputs": [{"name": name, "shape": [1, *array.shape], "datatype": "FP32",
                    "parameters": {"binary_data_size": len(raw[name])}} for name, array in inputs.items()],
        "parameters": {"binary_data_output": True},
    }).encode()
    connection = UnixConnection(socket, timeout_s)
    try:
        connection.request("POST", f"/v2/models/{model}/infer", head + b"".join(raw.values()),
                           {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"})
        answer = connection.getresponse()
        body = answer.read()
        length = int(answer.headers.get("Inference-Header-Content-Length", len(body)))
        return _parse(answer.status, json.loads(body[:length]), body[length:])
    finally:
        connection.close()


def _parse(status: int, told: dict[str, Any], raw: bytes) -> Answer:
    outputs: Arrays = {}
    at = 0
    for tensor in told.get("outputs", []):
        size = tensor["parameters"]["binary_data_size"]
        array = np.frombuffer(raw[at : at + size], DTYPE[tensor["datatype"]]).reshape(tensor["shape"])
        outputs[tensor["name"]], at = array[0], at + size
    assert at == len(raw), "bytes that belong to no output"
    return Answer(status, told, outputs)
