"""Writing one teacher's shards: each is whole on the disk before the next one begins, and none is made twice.

Memory holds one batch, however many samples there are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from fmdeploy.draft import Draft
from fmdeploy.errors import ArtifactError
from fmdeploy.progress import progress
from fmdeploy.task import Array, Arrays, Samples
from fmdeploy.teacher.caching.index import Address, Stored, basis_name, shard_name
from fmdeploy.teacher.caching.reuse import Shelf
from fmdeploy.teacher.caching.roundtrip import SAMPLED, Sums, error_sums
from fmdeploy.teacher.caching.shardfile import NOTE, ShardWriter, map_noted, map_safetensors, write_shard
from fmdeploy.teacher.encodings.base import Encoding, require_finite, state_of, stored_name
from fmdeploy.teacher.encodings.pca import Moments
from fmdeploy.teacher.encodings.registry import Spelling, make, read_feature, read_output
from fmdeploy.teacher.view import FEATURE, TeacherView
from fmdeploy.training.device import default_device
from fmdeploy.training.distributed import world

PCA_SAMPLES = 1024
BLOCK_BYTES = 2**22


@dataclass
class CacheWriter:
    """Writes the shards of one address.

    Attributes:
        draft: The FEATURES in the making.
        address: What is cached.
        samples: In the order of the shards.
        fitting: Gives the samples that a PCA is fitted on: those of the train split.
        view: Loads the teacher; called only when something must be computed.
        shelf: Finished files of other artifacts.
    """

    draft: Draft
    address: Address
    samples: Samples
    fitting: Callable[[], Samples]
    view: Callable[[], TeacherView]
    shelf: Shelf

    @cached_property
    def teacher(self) -> TeacherView:
        """The teacher; loading it waits until a shard is missing."""
        return self.view()

    def write(self, numbers: range) -> None:
        """Write the shards `numbers`, taking those that are there already; every process makes its own share."""
        rank, size = world()
        self._prepare_basis()
        with progress("cache", total=len(numbers[rank::size])) as bar:
            for number in numbers[rank::size]:
                target = self.draft.path(shard_name(self.address.key, number))
                if not (is_whole(target, self.address, number) or self.shelf.take(target, self.address, number)):
                    self._write_one(target, number)
                bar.advance()

    def _write_one(self, target: Path, number: int) -> None:
        start = number * self.address.per_shard
        index = np.arange(start, min(start + self.address.per_shard, len(self.samples)))
        layout = {stored_name(name, part): (dtype, (len(index), *shape))
                  for name, encoding in self.encodings.items() for part, (dtype, shape) in encoding.parts().items()}
        blocks = self._blocks(index)
        first = next(blocks)
        sums = {name: self._error(name, value[:SAMPLED]) for name, value in first.items()}
        at = 0
        with ShardWriter(target, layout, {NOTE: self._note(number, sums)}) as file:
            for found in chain((first,), blocks):
                file.put(at, {stored_name(name, part): array for name, value in found.items()
                              for part, array in self._encoded(name, value).items()})
                at += len(next(iter(found.values())))

    def _error(self, name: str, value: Array) -> Sums:
        encoding = self.encodings[name]
        return error_sums(encoding.compared(value), encoding.compared(encoding.decode(self._encoded(name, value))))

    def _encoded(self, name: str, value: Array) -> Arrays:
        encoding = self.encodings[name]
        if not encoding.notices:
            require_finite(name, value, encoding.limit)
        try:
            return encoding.encode(value)
        except FloatingPointError:
            require_finite(name, value, encoding.limit)
            raise

    def _blocks(self, index: Array) -> Iterator[Arrays]:
        """The answers in pieces that fit the processor's cache: encoding whole batches is twice as slow."""
        for found in self._forward(self.samples, index):
            count, size = len(next(iter(found.values()))), sum(value.nbytes for value in found.values())
            step = max(1, BLOCK_BYTES * count // max(1, size))
            for at in range(0, count, step):
                yield {name: value[at : at + step] for name, value in found.items()}

    def _note(self, number: int, sums: Mapping[str, Sums]) -> str:
        arrays = {name: Stored(shape=encoding.shape, encoding=str(self._spelling(name))).model_dump(mode="json")
                  for name, encoding in self.encodings.items()}
        return json.dumps({"key": self.address.key, "shard": number, "arrays": arrays, "sums": sums}, sort_keys=True)

    def _forward(self, samples: Samples, index: Array) -> Iterator[Arrays]:
        """The teacher's answers to the samples `index`, a batch at a time, as the address names them."""
        for start in range(0, len(index), self.address.batch):
            inputs, _ = samples.batch(index[start : start + self.address.batch])
            found = self.teacher.arrays(inputs, default_device())
            yield {name: np.ascontiguousarray(value) for name, value in found.items()
                   if name in self.address.logits or name.startswith(FEATURE)}

    @cached_property
    def encodings(self) -> dict[str, Encoding]:
        """The encoding of each array, made for the shapes of the first sample's answers."""
        first = next(self._forward(self.samples, np.arange(1)))
        return {name: self._encoding(name, value.shape[1:]) for name, value in first.items()}

    def _encoding(self, name: str, shape: tuple[int, ...]) -> Encoding:
        target = self.draft.root / basis_name(self.address.key)
        state = state_of(map_safetensors(target), name) if target.is_file() else {}
        return make(name, self._spelling(name), shape, is_feature=name.startswith(FEATURE), state=state)

    def _spelling(self, name: str) -> Spelling:
        is_feature = name.startswith(FEATURE)
        return read_feature(self.address.encoding) if is_feature else read_output(self.address.logits[name])

    def _prepare_basis(self) -> None:
        """Fit the components of a PCA once; the other processes wait for them."""
        if read_feature(self.address.encoding).name != "pca":
            return
        target = self.draft.path(basis_name(self.address.key))
        if self.draft.is_main and not target.is_file() and not self.shelf.take_basis(target, self.address):
            write_shard(target, self._fit(), {NOTE: json.dumps({"key": self.address.key})})
        if world()[1] > 1:
            torch.distributed.barrier()

    def _fit(self) -> Arrays:
        """Components of each feature, from samples spread evenly over the train split."""
        samples, moments = self.fitting(), dict[str, Moments]()
        amount = read_feature(self.address.encoding).amount
        index = np.unique(np.linspace(0, len(samples) - 1, min(PCA_SAMPLES, len(samples))).astype(np.int64))
        for found in self._forward(samples, index):
            for name, value in found.items():
                if name.startswith(FEATURE):
                    moments.setdefault(name, Moments(value.shape[1])).add(value)
        return {stored_name(name, part): array for name, sums in moments.items()
                for part, array in sums.components(amount).items()}


def is_whole(path: Path, address: Address, number: int) -> bool:
    """Whether the file is this very shard: what a killed run, or a lost disk, left behind may be anything."""
    if not path.is_file():
        return False
    try:
        note = map_noted(path)[1]
    except ArtifactError:
        return False
    return (note["key"], note["shard"]) == (address.key, number)
