"""What a run draws from a mixture: the order, and what each sample weighs in the loss.

Legend: N samples of all domains, B batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.task import Samples
from fmdeploy.training.mixture.sampler import MixtureSampler
from fmdeploy.training.sampler import Index, Sampler, make_sampler

WEIGHT = "sample_weight"  # a target that the task's loss weighs samples by


@dataclass(frozen=True)
class Draws:
    """Some samples of a mixture, or all of them, at their rates.

    Attributes:
        samples: Of all domains.
        index: Numbers of those that are drawn from; None: all.
        rate_N: float64 (N,), mean 1 over those that are drawn from; None where they are drawn equally often.
        importance: Whether the loss undoes the rates.
    """

    samples: Samples
    index: Index | None = None
    rate_N: Array | None = None
    importance: bool = False

    def sampler(self, batch: int, seed: int) -> Sampler:
        """The order, `batch` samples a step."""
        if self.rate_N is None:
            return make_sampler(self.samples, batch, seed, self.index)
        chosen = np.arange(len(self.samples)) if self.index is None else self.index
        return MixtureSampler(self.rate_N[chosen], batch, seed, chosen, getattr(self.samples, "blocks", None))

    def batch(self, numbers: Index) -> tuple[Arrays, Arrays]:
        """Inputs and targets of the samples `numbers` (B,), with their weights in the loss; see `weights`."""
        inputs, targets = self.samples.batch(numbers)
        weights = self.weights(numbers)
        return inputs, targets if weights is None else {**targets, WEIGHT: weights}

    def weights(self, numbers: Index) -> Array | None:
        """float32 (B,) of the loss: 1 / rate where it is to stay that of the natural distribution, else None.

        They average 1 over the draws.
        """
        if self.rate_N is None or not self.importance:
            return None
        return np.asarray(1 / self.rate_N[numbers], np.float32)
