"""What a real TensorRT compiler makes of an ONNX file, on a machine without a GPU.

TensorRT-RTX parses and compiles ahead of time without a driver. Its log names every engine layer with the types of
its operands and the ONNX nodes it came from, and that answers what can be answered without a device.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fmdeploy.errors import GateError, ModelFileError
from fmdeploy.export.tensorrt.builder import Options, Problem
from fmdeploy.export.tensorrt.isolated import Ended, Limits, build_isolated
from fmdeploy.export.tensorrt.layertable import EngineLayer, UnreadableLogError, read_layers
from fmdeploy.export.tensorrt.verdict import NodeVerdict, is_compute, precision_of, unmet, verdicts
from fmdeploy.runtime.backends.tensorrt_api import ApiName, installed, load_api

Status = Literal["ok", "rejected", "build-failed", "unreadable", "precision", "crashed", "timeout", "out-of-memory"]
API: ApiName = "tensorrt-rtx"  # the compiler that needs no GPU
TIMEOUT_S, MEMORY_MIB = 600.0, 8192
MAX_MODEL_BYTES = 2**31 - 1  # protobuf's own limit
PROVES = "The TensorRT parser accepts the file, the compiler builds an engine, its layers have these operand types."
NOT_PROVEN = ("Nothing was run: neither speed nor numbers. TensorRT-RTX is not the TensorRT of JetPack and has no "
              "sm_87 (Orin) target: the parser's rules carry over, what gets fused may not.")


def wanted_version(asked: bool | None) -> str | None:
    """Version of the compiler that will check, None where nothing will.

    Args:
        asked: True insists on the check, False leaves it out, None checks where the package is installed.

    Raises:
        MissingDependencyError: the check was asked for, and the package is not installed.
    """
    if asked is False or (asked is None and not installed(API)):
        return None
    return load_api(API).version


@dataclass(frozen=True)
class CompileReport:
    """What the compiler made of one file.

    Attributes:
        status: "ok", or the first thing that went wrong.
        errors: All that went wrong.
        layers: Every engine layer.
        nodes: Every convolution and matrix product of the network, with its precision.
        api: Which package compiled.
        version: Its full version.
        engine_bytes: Size of the engine; None where there is none.
        seconds: Parsing and building.
        peak_mib: Largest resident set of the build process.
    """

    status: Status
    errors: tuple[Problem, ...] = ()
    layers: tuple[EngineLayer, ...] = ()
    nodes: tuple[NodeVerdict, ...] = ()
    api: ApiName = "tensorrt-rtx"
    version: str = ""
    engine_bytes: int | None = None
    seconds: float = 0.0
    peak_mib: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the file compiles and meets what was required of it."""
        return self.status == "ok"

    @property
    def counts(self) -> dict[str, int]:
        """Precision → number of convolutions and matrix products."""
        return dict(sorted(Counter(node.precision for node in self.nodes).items()))

    def __str__(self) -> str:
        if not self.passed:
            more = f" (and {len(self.errors) - 1} more)" if len(self.errors) > 1 else ""
            return f"{self.api} {self.version} {self.status}: {self.errors[0]}{more}"
        counts = ", ".join(f"{number} {name}" for name, number in self.counts.items()) or "none"
        return f"{self.api} {self.version} compiles it: {len(self.layers)} layers; conv and matrix products: {counts}"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON without what differs from run to run (seconds, memory)."""
        return {
            "status": self.status, "errors": [asdict(problem) for problem in self.errors], "api": self.api,
            "version": self.version, "engine_bytes": self.engine_bytes, "counts": self.counts,
            "nodes": [asdict(node) for node in self.nodes], "layers": [_layer_json(layer) for layer in self.layers],
        }


def compile_check(
    path: Path, *, require_int8: Sequence[str] = (), timeout_s: float = TIMEOUT_S, memory_mib: int = MEMORY_MIB,
    api: ApiName = "tensorrt-rtx",
) -> CompileReport:
    """Compile an ONNX file in a child process and say what came of it.

    Args:
        path: A single-file ONNX model. Files from strangers go through `onnxfile.reading` first.
        require_int8: Names of ONNX nodes that must run in INT8.
        timeout_s: The child is killed after so many seconds.
        memory_mib: And beyond so many MiB.
        api: The package that compiles.

    Raises:
        MissingDependencyError: the package is not installed.
        ModelFileError: there is no such file, or it is larger than any ONNX file.
    """
    if not installed(api):
        load_api(api)
    ended = build_isolated(api, path, model_digest(path), Options(), Limits(timeout_s, memory_mib))
    return judge(ended, api, require_int8)


def model_digest(path: Path) -> str:
    """sha256 of a model file.

    Raises:
        ModelFileError: it is not a regular file, or too large.
    """
    if not path.is_file():
        raise ModelFileError("no such model file", where=path)
    if path.stat().st_size > MAX_MODEL_BYTES:
        raise ModelFileError("is larger than an ONNX file can be", where=path, expected=f"<= {MAX_MODEL_BYTES} bytes")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def judge(ended: Ended, api: ApiName, require_int8: Sequence[str] = ()) -> CompileReport:
    """Turn what a build left into a verdict; nothing that cannot be read passes."""
    facts: dict[str, Any] = {"api": api, "version": str(ended.result.get("version", "")),
                             "seconds": ended.result.get("seconds", 0.0), "peak_mib": ended.result.get("peak_mib"),
                             "engine_bytes": ended.result.get("engine_bytes")}
    if ended.fate != "done":
        return CompileReport(ended.fate, ended.problems, **facts)
    if ended.engine is None:
        status: Status = "build-failed" if ended.result["parsed"] else "rejected"
        return CompileReport(status, ended.problems, **facts)
    try:
        layers = read_layers(ended.result["layers"])
        nodes = verdicts(ended.nodes, layers)
    except UnreadableLogError as error:
        return CompileReport("unreadable", (Problem("layers", str(error)),), **facts)
    missing = unmet(nodes, require_int8)
    return CompileReport("precision" if missing else "ok", missing, layers, nodes, **facts)


def require_passed(report: CompileReport, where: object) -> None:
    """Fail where a file does not compile as it should.

    Raises:
        GateError: names the first problem.
    """
    if not report.passed:
        raise GateError(f"fails the TensorRT compile check, {report}", where=where,
                        fix="--no-verify-tensorrt exports it unchecked")


def _layer_json(layer: EngineLayer) -> dict[str, Any]:
    return {
        "name": layer.name, "kind": layer.kind, "compute": is_compute(layer),
        "precision": precision_of(layer) if is_compute(layer) else None,
        "inputs": [t.dtype for t in layer.inputs], "weights": [t.dtype for t in layer.weights if not t.is_scalar],
        "outputs": [t.dtype for t in layer.outputs], "nodes": list(layer.nodes),
    }
