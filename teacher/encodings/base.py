"""What every encoding can do.

Legend: B samples, `...` the shape of one sample's array.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fmdeploy.errors import DataError
from fmdeploy.task import Array, Arrays

MAIN = ""
"""The part that carries an array's own name in a shard; others are called `<name>:<part>`."""


class Part(NamedTuple):
    """One stored array of one sample."""

    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes a sample."""
        return int(self.dtype.itemsize * np.prod(self.shape, dtype=np.int64))


class Encoding(ABC):
    """Stores float arrays (B, ...) as a few typed arrays (B, ...) and gives them back.

    Attributes:
        shape: Of one sample's array, without the batch axis.
        guarded: Parts that must be finite, whoever wrote them: one wrong scale ruins every value it belongs to.
        limit: Largest magnitude that can be stored.
        notices: Whether `encode` raises FloatingPointError by itself for what cannot be stored: it saves a pass.
    """

    guarded: tuple[str, ...] = ()
    limit: float = float(np.finfo(np.float32).max)
    notices: bool = False

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    @abstractmethod
    def parts(self) -> Mapping[str, Part]:
        """Name of each part → its type and its shape for one sample."""

    @abstractmethod
    def encode(self, value: Array) -> Arrays:
        """Parts (B, ...) of finite float32 values (B, ...)."""

    @abstractmethod
    def decode(self, parts: Arrays) -> Array:
        """Float values (B, ...) of parts (B, ...); vectorised over the batch, and free of torch."""

    def compared(self, value: Array) -> Array:
        """What the error is measured on: the values, unless only something that follows from them is kept."""
        return value


def stored_name(name: str, part: str) -> str:
    """What a part of the array `name` is called in a shard."""
    return f"{name}:{part}" if part else name


def state_of(stored: Arrays, name: str) -> Arrays:
    """What an encoding of one array needs, such as `basis` and `mean`, out of the file that holds it for all."""
    return {key.removeprefix(f"{name}:"): array for key, array in stored.items() if key.rpartition(":")[0] == name}


def require_finite(name: str, value: Array, limit: float) -> None:
    """Refuse NaN, infinity and what lies beyond `limit`.

    Raises:
        DataError: with the offending range.
    """
    import torch

    low, high = (float(x) for x in torch.aminmax(torch.from_numpy(value)))  # one pass, and NaN comes through
    if not -limit <= low <= high <= limit:
        raise DataError("the teacher's answer cannot be stored", where=name, expected=f"within ±{limit:g}",
                        found=f"{low:g} … {high:g}", fix="Store it as float32, or look at the teacher for NaN")
