"""Calibration data for a foreign file: named arrays (N, ...) in .npz or .safetensors, checked against its inputs."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from onnx import ModelProto, ValueInfoProto, helper

from fmdeploy.arrays import Array, Arrays
from fmdeploy.errors import DataError

MAX_BYTES = 8 * 2**30  # of all arrays, as declared: an .npz of 261 kB can unpack to 256 MiB


def read_samples(path: Path, model: ModelProto) -> Arrays:
    """Read one array an input of `model`, all of one length N, in the inputs' types.

    Raises:
        DataError: the file is missing, another format, empty, holds NaN, or does not fit the model's inputs.
    """
    if not path.is_file():
        raise DataError("no such calibration file", where=path)
    try:
        arrays = _safetensors(path) if path.suffix == ".safetensors" else _npz(path)
    except DataError:
        raise
    except Exception as error:  # zipfile, numpy and safetensors each have their own
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise DataError(f"is not a readable .npz or .safetensors file: {reason}", where=path) from error
    return _fitted(arrays, model, path)


def batches(samples: Arrays, model: ModelProto) -> Iterator[Arrays]:
    """Feed the samples in the batch size that the model was exported with: 1 where it is dynamic."""
    size = max((_dims(value)[0] or 1 for value in _inputs(model) if _dims(value)), default=1)
    count = len(next(iter(samples.values()))) // size
    for k in range(count):
        yield {name: np.ascontiguousarray(values[k * size : (k + 1) * size]) for name, values in samples.items()}


def _safetensors(path: Path) -> Arrays:
    from safetensors.numpy import load_file

    return dict(load_file(path))


def _npz(path: Path) -> Arrays:
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > MAX_BYTES:
        raise DataError("unpacks to too much", where=path, expected=f"at most {MAX_BYTES} bytes", found=size)
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _inputs(model: ModelProto) -> list[ValueInfoProto]:
    stored = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in stored]


def _dims(value: ValueInfoProto) -> list[int]:
    """Sizes of an input's axes, 0 where dynamic."""
    return [axis.dim_value for axis in value.type.tensor_type.shape.dim]


def _fitted(arrays: Arrays, model: ModelProto, path: Path) -> Arrays:
    names = [value.name for value in _inputs(model)]
    if missing := [name for name in names if name not in arrays]:
        raise DataError(f"holds nothing for the input {missing[0]!r}", where=path, expected=names,
                        found=sorted(arrays)[:8])
    found: Arrays = {}
    for value in _inputs(model):
        array, dims = arrays[value.name], _dims(value)
        fits = bool(dims) and array.ndim == len(dims)
        if not fits or any(d and d != s for d, s in zip(dims[1:], array.shape[1:], strict=True)):
            raise DataError("does not fit the model", where=f"{path}, {value.name!r}",
                            expected=["N", *(d or "any" for d in dims[1:])], found=list(array.shape))
        if len(array) < max(dims[:1] or [1], default=1) or not len(array):
            raise DataError("holds no sample", where=f"{path}, {value.name!r}", found=len(array))
        found[value.name] = _typed(array, value, f"{path}, {value.name!r}")
    lengths = {name: len(array) for name, array in found.items()}
    if len(set(lengths.values())) > 1:
        raise DataError("holds another number of samples for each input", where=path, found=lengths)
    if all(array.size == 0 or array.min() == array.max() for array in found.values()):
        raise DataError("says nothing about ranges: every value is the same", where=path)
    return found


def _typed(array: Array, value: ValueInfoProto, where: str) -> Array:
    """The array in the type of its input, which must hold its values: 300 is 44 in uint8, 1e300 infinity in float32."""
    if array.dtype.kind not in "fiub" or not np.isfinite(array).all():
        raise DataError("holds NaN, infinity or no numbers", where=where, found=array.dtype)
    kind = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    with np.errstate(all="ignore"):
        typed = array.astype(kind)
        same = np.isfinite(typed.astype(np.float64)) if typed.dtype.kind not in "iub" else typed == array
    if not same.all():
        raise DataError("holds values that the type of the input does not", where=where, expected=np.dtype(kind),
                        found=array[~same].ravel()[0])
    return typed
