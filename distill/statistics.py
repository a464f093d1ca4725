"""Statistics of a teacher's features, estimated once on fixed samples: what the whitened loss measures with.

Legend: N samples, D channels of the map, h w its rows and columns, P positions of all samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fmdeploy.task import Arrays

SAMPLES = 512
CHUNK = 64
Wide = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Statistics:
    """First and second moments of a map's channels.

    Attributes:
        mean_D: Mean of each channel.
        covariance_DD: Covariance of the channels over all positions.
    """

    mean_D: Wide
    covariance_DD: Wide

    @classmethod
    def of(cls, map_NDhw: npt.NDArray[np.floating]) -> Statistics:
        """Moments of (N, D, h, w)."""
        moments = Moments(map_NDhw.shape[1])
        moments.add(map_NDhw)
        return moments.result()


class Moments:
    """Sums that can be added to chunk by chunk; float64, so that the order hardly matters."""

    def __init__(self, channels: int) -> None:
        self.count, self.sum_D, self.product_DD = 0, np.zeros(channels), np.zeros((channels, channels))

    def add(self, map_NDhw: npt.NDArray[np.floating]) -> None:
        """Take the positions of (N, D, h, w) in."""
        rows_PD = np.moveaxis(map_NDhw, 1, -1).reshape(-1, map_NDhw.shape[1]).astype(np.float64)
        self.count += len(rows_PD)
        self.sum_D += rows_PD.sum(axis=0)
        self.product_DD += rows_PD.T @ rows_PD

    def result(self) -> Statistics:
        """The moments of all that was added."""
        mean_D = self.sum_D / self.count
        return Statistics(mean_D, self.product_DD / self.count - np.outer(mean_D, mean_D))


def measure(answers: Callable[[npt.NDArray[np.int64]], Arrays], names: list[str], count: int) -> dict[str, Statistics]:
    """Statistics of the maps `names` on up to 512 samples, evenly spaced over all `count`: the same in every run.

    Args:
        answers: From sample numbers (B,) to the teacher's arrays (B, ...).
        names: Of the maps.
        count: Number of training samples.
    """
    index = np.unique(np.linspace(0, count - 1, min(SAMPLES, count)).round().astype(np.int64))
    found: dict[str, Moments] = {}
    for start in range(0, len(index), CHUNK):
        arrays = answers(index[start : start + CHUNK])
        for name in names:
            found.setdefault(name, Moments(arrays[name].shape[1])).add(arrays[name])
    return {name: moments.result() for name, moments in found.items()}
