"""What an engine must be before its first run: names, directions, types, shapes, places, one profile."""

from __future__ import annotations

from typing import Any

import numpy as np

from fmdeploy.errors import ModelFileError
from fmdeploy.iospec import IOSpec
from fmdeploy.runtime.backends.tensorrt_api import Api


def check_engine(api: Api, engine: Any, io: IOSpec, where: object) -> None:
    """Hold a loaded engine against the specification.

    Raises:
        ModelFileError: its inputs and outputs are others, or it is not of one profile with static shapes.
    """
    found, wanted = _tensors(api, engine), _wanted(io)
    if found != wanted:
        raise ModelFileError("the engine's inputs and outputs are not those of io.json", where=where, expected=wanted,
                             found=found)
    if (profiles := engine.num_optimization_profiles) != 1:
        raise ModelFileError("the engine has another number of optimisation profiles", where=where, expected=1,
                             found=profiles)
    if not getattr(engine, "weights_loaded", True):  # TensorRT 11 may load them later
        raise ModelFileError("the engine's weights are not loaded", where=where)
    if engine.num_layers < 1:
        raise ModelFileError("the engine has no layers", where=where)


def device_memory_bytes(engine: Any) -> int | None:
    """Scratch memory that a context of this engine takes on the device."""
    for name in ("device_memory_size_v2", "device_memory_size"):  # the second one is gone in TensorRT 11
        size = getattr(engine, name, None)
        if size is not None:
            return int(size)
    return None


def _tensors(api: Api, engine: Any) -> dict[str, tuple[object, ...]]:
    """Name to direction, type, shape and place; a dynamic dimension is -1 and fits nothing."""
    trt = api.module
    found: dict[str, tuple[object, ...]] = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        mode = "input" if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "output"
        dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name
        place = "device" if engine.get_tensor_location(name) == trt.TensorLocation.DEVICE else "host"
        found[name] = (mode, dtype, tuple(engine.get_tensor_shape(name)), place)
    return found


def _wanted(io: IOSpec) -> dict[str, tuple[object, ...]]:
    sides = (("input", io.inputs), ("output", io.outputs))
    return {spec.name: (mode, spec.dtype, (1, *spec.shape), "device") for mode, specs in sides for spec in specs}
