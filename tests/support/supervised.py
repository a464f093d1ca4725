"""Supervised runtimes on the toy bundle, with faults, and what their frames should hold."""

from __future__ import annotations

import functools
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fmdeploy.arrays import Arrays
from fmdeploy.runtime.frame import Frame
from fmdeploy.runtime.supervisor.config import Supervision
from fmdeploy.runtime.supervisor.process import WorkerProcess
from fmdeploy.runtime.supervisor.supervised import SupervisedRuntime
from support import faulty_worker
from support.runtimes import frame, runtime, toy_bundle

HARD_MS = 600.0
_NUMBERS = itertools.count(10_000)
PERIOD_MS = 200.0  # of the demo task


def supervised(folder: Path | None = None, *, hard_deadline_ms: float = HARD_MS, **options: Any) -> SupervisedRuntime:
    """A supervised runtime whose workers have the faults that frames name."""
    names = Supervision.__dataclass_fields__
    config = Supervision(hard_deadline_ms=hard_deadline_ms, terminate_ms=0.0, idle_self_test_ms=0.0)
    config = replace(config, **{name: options.pop(name) for name in list(options) if name in names})
    if folder is not None:
        config = replace(config, command=(sys.executable, str(Path(faulty_worker.__file__)), str(folder)))
    return SupervisedRuntime(toy_bundle(), **{"tiers": ("int8-cpu", "fp32"), **options}, supervision=config)


def wait_for(happened: Callable[[], object], seconds: float = 20.0) -> bool:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def ready_workers(runtime: SupervisedRuntime) -> list[WorkerProcess]:
    return [worker for worker in runtime.fleet.workers() if worker.ready is not None and not worker.lost]


def with_standby(runtime: SupervisedRuntime) -> SupervisedRuntime:
    """Wait until the standby is ready, too."""
    assert wait_for(lambda: len(ready_workers(runtime)) == 2)
    return runtime


@functools.lru_cache(200)
def reference(tier: str, seed: int) -> dict[str, bytes]:
    """The outputs of a frame, by the embedded runtime."""
    return {name: array.tobytes() for name, array in _embedded(tier).infer(frame(seed)).require_valid().outputs.items()}


@functools.cache
def _embedded(tier: str) -> Any:
    return runtime(tier)


def is_right(found: Frame, seed: int) -> bool:
    """Whether a frame holds exactly what its input gives."""
    return {name: array.tobytes() for name, array in found.outputs.items()} == reference(found.tier, seed)


def first_valid(runtime: SupervisedRuntime, *, period_ms: float = 20.0, seconds: float = 20.0) -> tuple[float, list[Frame]]:
    """Feed frames until one is valid; return the ms until then and the frames before it."""
    before: list[Frame] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        seed = next(_NUMBERS)
        found = runtime.infer(frame(seed))
        if found.valid:
            assert is_right(found, seed)
            return 1e3 * (time.perf_counter() - start), before
        assert not found.outputs
        before.append(found)
        time.sleep(period_ms / 1e3)
    raise AssertionError(f"no valid frame: {before[-1].record()}")


def fresh() -> Arrays:
    """A good frame that nobody has seen yet."""
    return frame(next(_NUMBERS))


def poisoned(fault: str, seed: int = 900) -> Arrays:
    return faulty_worker.poison(frame(seed), fault)


def write_models(folder: Path) -> None:
    """An endless loop, a long operation, and one that wants more memory than there is."""
    (folder / "loop.onnx").write_bytes(_loop())
    (folder / "matmul.onnx").write_bytes(_matmul(6000))
    (folder / "huge.onnx").write_bytes(_matmul(60_000))


def _model(nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto]) -> bytes:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    raw: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    return raw


def _loop() -> bytes:
    values = [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in (
        ("i", TensorProto.INT64, []), ("go", TensorProto.BOOL, []), ("v", TensorProto.FLOAT, [1, 1]),
        ("go_on", TensorProto.BOOL, []), ("w", TensorProto.FLOAT, [1, 1]))]
    body = helper.make_graph([helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Add", ["v", "v"], ["w"])],
                             "body", values[:3], values[3:])
    constants = [numpy_helper.from_array(np.array(2**62, np.int64), "trips"), numpy_helper.from_array(np.array(True), "yes")]
    return _model([helper.make_node("Loop", ["trips", "yes", "x"], ["y"], body=body)], constants)


def _matmul(size: int) -> bytes:
    """y = sum of a product of two matrices that are made inside, so that nothing folds them away."""
    constants = [numpy_helper.from_array(np.array([size, size], np.int64), "size"),
                 numpy_helper.from_array(np.array([1, 1], np.int64), "one")]
    return _model([
        helper.make_node("Expand", ["x", "size"], ["a"]),
        helper.make_node("MatMul", ["a", "a"], ["b"]),
        helper.make_node("MatMul", ["b", "a"], ["c"]),
        helper.make_node("ReduceMax", ["c"], ["d"], keepdims=1),
        helper.make_node("Reshape", ["d", "one"], ["y"]),
    ], constants)
