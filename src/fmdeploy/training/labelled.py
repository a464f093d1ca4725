"""Which samples have labels, where only a share of them may be used."""

from __future__ import annotations

import numpy as np

from fmdeploy.errors import DataError
from fmdeploy.task import Samples
from fmdeploy.training.sampler import Index


def labelled_index(samples: Samples, fraction: float, seed: int) -> Index:
    """Numbers of the samples whose labels may be used: those of `fraction` of the simulations, at least one.

    Whole simulations, because frames of one simulation say nearly the same: labelling every tenth frame of each would
    be worth far more than a tenth of the labels.

    Raises:
        DataError: there are no samples.
    """
    groups = np.unique(np.asarray(samples.groups))
    if not len(groups):
        raise DataError("there is nothing to train on")
    if fraction >= 1:
        return np.arange(len(samples))
    count = max(1, round(fraction * len(groups))) if fraction > 0 else 0
    chosen = np.random.default_rng(seed).permutation(groups)[:count]
    return np.flatnonzero(np.isin(samples.groups, chosen))
