"""Samples of several datasets as one: the new domain, and a replay buffer from the old ones.

Legend: N samples of all parts, B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.data.blocks import Blocks
from fmdeploy.errors import ConfigError, DataError
from fmdeploy.task import Samples

DOMAIN = "domain"
ABSENT = "none"
REPLAY_STREAM = 0x7270


class Joined:
    """Parts behind each other; see `task.Samples`. Slices get the axis `domain`.

    Args:
        parts: Domain name → samples of one task.

    Raises:
        DataError: the parts hold other arrays than the first one.
    """

    def __init__(self, parts: Mapping[str, Samples]) -> None:
        self.names, self.parts = tuple(parts), tuple(parts.values())
        self._first = np.cumsum([0, *(len(part) for part in self.parts)])
        self._refuse_other_arrays()

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def ids(self) -> tuple[str, ...]:
        """`<domain>:<sequence>/<frame>`."""
        return tuple(f"{name}:{i}" for name, part in zip(self.names, self.parts, strict=True) for i in part.ids)

    @property
    def groups(self) -> Array:
        """(N,) int64; groups of different parts differ."""
        found, start = [], 0
        for part in self.parts:
            own = np.unique(part.groups, return_inverse=True)[1].ravel()
            found.append(own + start)
            start += int(own.max(initial=-1)) + 1
        return np.concatenate(found).astype(np.int64)

    @property
    def slices(self) -> dict[str, Array]:
        """The axes of all parts, `none` where a part lacks one, and `domain`."""
        axes = dict.fromkeys(axis for part in self.parts for axis in part.slices)
        found = {axis: np.concatenate([_labels(part, axis) for part in self.parts]) for axis in axes}
        return {**found, DOMAIN: np.repeat(np.array(self.names), [len(part) for part in self.parts])}

    @property
    def blocks(self) -> Blocks | None:
        """Where the samples lie; None where a part does not say."""
        own: list[Blocks | None] = [getattr(part, "blocks", None) for part in self.parts]
        known = [blocks for blocks in own if blocks is not None]
        if len(known) < len(own):
            return None
        starts = np.cumsum([0, *(len(blocks.bytes_K) for blocks in known)])
        return Blocks(
            np.concatenate([blocks.block_N + start for blocks, start in zip(known, starts, strict=False)]),
            np.concatenate([blocks.bytes_K for blocks in known]), min(blocks.budget for blocks in known),
        )

    def batch(self, index: Array) -> tuple[Arrays, Arrays]:
        """Inputs and targets of the samples `index` (B,)."""
        pairs = self._each(index, lambda part, rows: part.batch(rows))
        inputs = _merged([(places, found[0]) for places, found in pairs], len(index))
        return inputs, _merged([(places, found[1]) for places, found in pairs], len(index))

    def frames(self, index: Array, offsets: Sequence[int]) -> Array:
        """Sensor planes at other frames, where all parts have them."""
        return self._asked("frames", index, offsets)

    def occupancy(self, index: Array, offsets: Sequence[int]) -> Array:
        """Labelled occupancy at other frames, where all parts have it."""
        return self._asked("occupancy", index, offsets)

    def motion(self, index: Array, offsets: Sequence[int]) -> Array:
        """The ego's motion, where all parts have it."""
        return self._asked("motion", index, offsets)

    def _asked(self, method: str, index: Array, offsets: Sequence[int]) -> Array:
        if lost := [name for name, part in zip(self.names, self.parts, strict=True) if not hasattr(part, method)]:
            raise DataError(f"samples of the domain {lost[0]} have no {method}", where="replay")
        found = self._each(index, lambda part, rows: getattr(part, method)(rows, offsets))
        return _merged([(places, {method: array}) for places, array in found], len(index))[method]

    def _each(self, index: Array, ask: Callable[[Any, Array], Any]) -> list[tuple[Array, Any]]:
        """For every part that is asked for something: places in the batch, and its answer."""
        index = np.asarray(index)
        owner_B = np.searchsorted(self._first, index, side="right") - 1
        found = []
        for number in np.unique(owner_B):
            places = np.flatnonzero(owner_B == number)
            found.append((places, ask(self.parts[number], index[places] - self._first[number])))
        return found

    def _refuse_other_arrays(self) -> None:
        first = [part.batch(np.arange(1)) for part in self.parts]
        shapes = [[{n: a.shape[1:] for n, a in kind.items()} for kind in batch] for batch in first]
        for name, shape in zip(self.names, shapes, strict=True):
            if shape != shapes[0]:
                raise DataError(f"the domain {name} holds other arrays than {self.names[0]}", where="replay",
                                expected=shapes[0], found=shape)


def _labels(part: Samples, axis: str) -> Array:
    return np.asarray(part.slices[axis]).astype(np.str_) if axis in part.slices else np.full(len(part), ABSENT)


def _merged(pieces: Sequence[tuple[Array, Arrays]], count: int) -> Arrays:
    if len(pieces) == 1:
        return pieces[0][1]
    found = {name: np.empty((count, *array.shape[1:]), array.dtype) for name, array in pieces[0][1].items()}
    for places, arrays in pieces:
        for name, array in arrays.items():
            found[name][places] = array
    return found


def replay_buffer(samples: Samples, count: int, seed: int) -> Array:
    """Numbers (count,) of samples to remember a domain by: strata of all slices in turn, within each at random.

    A uniform draw would forget the rare cases first, and they are what a buffer is for.

    Raises:
        ConfigError: the domain has fewer samples.
    """
    if count > len(samples):
        raise ConfigError("the replay buffer is larger than the domain", where="replay_samples", found=count,
                          expected=f"at most {len(samples)}")
    rng = np.random.default_rng((seed, REPLAY_STREAM))
    columns = [np.asarray(labels).astype(np.str_).tolist() for labels in samples.slices.values()]
    names = np.array(["\x1f".join(row) for row in zip(*columns, strict=True)] if columns else [""] * len(samples))
    order = rng.permutation(len(samples))
    turn = np.empty(len(samples), np.int64)
    for name in np.unique(names):
        mine = order[names[order] == name]
        turn[mine] = np.arange(len(mine))
    ranked = order[np.argsort(turn[order], kind="stable")]
    return np.sort(ranked[:count])
