"""What the server says of itself and of its model: KServe metadata, Triton's config and statistics."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fmdeploy.iospec import TensorSpec
from fmdeploy.runtime.serve.metrics import Metrics
from fmdeploy.runtime.serve.request import DATATYPE
from fmdeploy.runtime.serve.station import Station

EXTENSIONS = ("binary_tensor_data", "model_configuration", "statistics")
PLATFORM = "fmdeploy"


def server_metadata(*, reload: bool) -> dict[str, Any]:
    """GET /v2."""
    extensions = [*EXTENSIONS, *(["model_repository"] if reload else [])]
    return {"name": PLATFORM, "version": version("fmdeploy"), "extensions": extensions}


def model_metadata(station: Station) -> dict[str, Any]:
    """GET /v2/models/M. Shapes have a batch axis, and it is 1."""
    serving, io = station.serving, station.serving.io
    return {
        "name": station.name, "versions": [serving.version], "platform": PLATFORM,
        "inputs": [_tensor(spec) for spec in io.inputs], "outputs": [_tensor(spec) for spec in io.outputs],
        "parameters": {"bundle": serving.bundle.digest, "tier": station.tier, "preprocessing": io.preprocessing},
    }


def model_config(station: Station) -> dict[str, Any]:
    """GET /v2/models/M/config, as Triton answers: no batching, so every shape is complete."""
    io = station.serving.io
    return {
        "name": station.name, "platform": PLATFORM, "backend": PLATFORM, "runtime": "",
        "version_policy": {"latest": {"num_versions": 1}}, "max_batch_size": 0,
        "input": [{**_typed(spec), "format": "FORMAT_NONE", "optional": False} for spec in io.inputs],
        "output": [_typed(spec) for spec in io.outputs],
        "instance_group": [{"name": station.name, "kind": "KIND_CPU", "count": 1}],
        "parameters": {"tier": {"string_value": station.tier},
                       "bundle": {"string_value": station.serving.bundle.digest}},
    }


def statistics(station: Station, metrics: Metrics) -> dict[str, Any]:
    """GET /v2/models/M/stats, as far as it is counted here."""
    found = metrics.totals()
    good = {"count": int(found["valid"]), "ns": int(found["infer_s"] * 1e9)}
    return {"model_stats": [{
        "name": station.name, "version": station.serving.version,
        "inference_count": int(found["valid"] + found["invalid"]),
        "execution_count": int(found["valid"] + found["invalid"]),
        "inference_stats": {
            "success": good, "fail": {"count": int(found["invalid"]), "ns": 0},
            "queue": {"count": int(found["valid"] + found["invalid"]), "ns": int(found["queue_s"] * 1e9)},
        },
    }]}


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": DATATYPE[spec.dtype], "shape": [1, *spec.shape]}


def _typed(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "data_type": f"TYPE_{DATATYPE[spec.dtype]}", "dims": [1, *spec.shape]}
