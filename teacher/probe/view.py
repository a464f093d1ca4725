"""What a rung sees of one network: chosen samples of each split, their features and labels, computed once.

Legend: N chosen samples of a split, P pooled features, D channels, h w rows and columns of a feature map,
K statistics of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fmdeploy.arrays import Array, Arrays
from fmdeploy.data.format import Dataset
from fmdeploy.errors import FmdeployError
from fmdeploy.evaluate.evaluation import Evaluation, data_key
from fmdeploy.task import Metric, Samples, Task
from fmdeploy.teacher.probe.subject import Subject

BATCH = 64
MAX_MAP_BYTES = 512 * 2**20
ValueT = TypeVar("ValueT")


class NotMeasuredError(FmdeployError):
    """A rung cannot be measured here; its text is the reason. Never a pass."""

    exit_code = 1


@dataclass
class SplitChoice:
    """Samples of every split that probes use, the same for every network.

    Attributes:
        task: Whose samples.
        data: The dataset.
        limits: Split → most samples of it; drawn by `seed` where it has more.
        seed: Of the draw.
    """

    task: Task
    data: Dataset
    limits: dict[str, int]
    seed: int = 0
    _samples: dict[str, Samples] = field(default_factory=dict, repr=False)

    def samples(self, split: str) -> Samples:
        """All samples of a split, loaded once.

        Raises:
            NotMeasuredError: the dataset has no such split.
        """
        if split not in self._samples:
            if not self.data.splits.get(split):
                raise NotMeasuredError(f"the dataset has no {split} split")
            self._samples[split] = self.task.samples(self.data, split)
        return self._samples[split]

    def index(self, split: str) -> Array:
        """Numbers int64 (N,) of the chosen samples, ascending."""
        count, limit = len(self.samples(split)), self.limits.get(split, 0)
        if not limit or count <= limit:
            return np.arange(count)
        return np.sort(np.random.default_rng(self.seed).permutation(count)[:limit])


@dataclass
class View:
    """One network and the chosen samples; whatever a rung computes through `once` is kept for the next rung."""

    subject: Subject
    choice: SplitChoice
    _kept: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def once(self, key: Hashable, make: Callable[[], ValueT]) -> ValueT:
        """`make()`, computed at the first call with this key."""
        if key not in self._kept:
            self._kept[key] = make()
        found: ValueT = self._kept[key]
        return found

    def samples(self, split: str) -> Samples:
        """All samples of `split`; rungs use those numbered by `index`."""
        return self.choice.samples(split)

    def index(self, split: str) -> Array:
        """Numbers int64 (N,) of the samples of `split` to use, ascending."""
        return self.choice.index(split)

    def pooled(self, split: str) -> Tensor:
        """Pooled features float32 (N, P).

        Raises:
            NotMeasuredError: the network has no features.
        """
        return self._features(split)[0]

    def maps(self, split: str) -> Tensor:
        """Feature maps (N, D, h, w) in half precision, to save memory: convert the part you use.

        Raises:
            NotMeasuredError: the network has no features.
        """
        return self._features(split)[1]

    def targets(self, split: str) -> Arrays:
        """Labels (N, ...) of the chosen samples."""
        return self.once(("targets", split), lambda: _joined(
            [self.samples(split).batch(part)[1] for part in self._parts(split)]))

    def labels(self, split: str, axis: str) -> Array:
        """Labels (N,) of a slicing such as `scenario`.

        Raises:
            NotMeasuredError: the samples have no such slicing.
        """
        found = self.samples(split).slices
        if axis not in found:
            raise NotMeasuredError(f"the samples have no slicing {axis!r}")
        return np.asarray(found[axis])[self.index(split)]

    def evaluation(
        self, metric: Metric, stats_NK: Array, split: str = "test", index: Array | None = None
    ) -> Evaluation:
        """Statistics (N, K) float64 of the samples `index` (default: all chosen ones) as what intervals are made of."""
        samples = self.samples(split)
        chosen = self.index(split) if index is None else index
        ids = tuple(samples.ids[int(k)] for k in chosen)
        slices = {name: np.asarray(labels)[chosen] for name, labels in samples.slices.items()}
        return Evaluation(ids, np.asarray(samples.groups, np.int64)[chosen], slices,
                          {metric.name: np.asarray(stats_NK, np.float64)}, data_key(self.choice.data.digest, split))

    def _parts(self, split: str) -> list[Array]:
        index = self.index(split)
        return [index[at : at + BATCH] for at in range(0, len(index), BATCH)]

    def _features(self, split: str) -> tuple[Tensor, Tensor]:
        return self.once(("features", split), lambda: self._extract(split))

    def _extract(self, split: str) -> tuple[Tensor, Tensor]:
        compute = self.subject.features
        if compute is None:
            raise NotMeasuredError(self.subject.why or "no features")
        pooled, maps, samples = [], [], self.samples(split)
        for part in self._parts(split):
            found = compute(samples.batch(part)[0])
            if not (found.pooled_BP.isfinite().all() and found.map_BDhw.half().isfinite().all()):
                raise NotMeasuredError("the features are not finite numbers of half precision")
            pooled.append(found.pooled_BP.float())
            maps.append(found.map_BDhw.half())
            if (size := maps[0][0].numel() * 2 * len(self.index(split))) > MAX_MAP_BYTES:
                raise NotMeasuredError(f"the features of {split} take {size >> 20} MiB, more than "
                                       f"{MAX_MAP_BYTES >> 20}: use fewer samples")
        return torch.cat(pooled), torch.cat(maps)


def _joined(parts: list[Arrays]) -> Arrays:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
