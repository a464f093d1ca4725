"""How often each sample is seen, from a recipe: 1 is as often as naturally.

Legend: N samples, S strata.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.data.sequence import SequenceInfo
from fmdeploy.errors import ConfigError
from fmdeploy.task import Samples
from fmdeploy.training.mixture.recipe import MixtureRecipe

ABSENT = "none"
LABELS_AT_ONCE = 256
STEPS = 200  # halvings of an interval: more than a float64 can tell apart


def axis_values(samples: Samples, axis: str, sequences: Sequence[SequenceInfo]) -> Array:
    """Value (N,) of every sample on `axis`: a slice of the task, a class label, or a key of its sequence's metadata.

    Raises:
        ConfigError: no sample has it.
    """
    if axis in samples.slices:
        return np.asarray(samples.slices[axis]).astype(np.str_)
    label = samples.batch(np.arange(min(1, len(samples))))[1].get(axis)
    if label is not None and label.ndim == 1:
        parts = np.array_split(np.arange(len(samples)), -(-len(samples) // LABELS_AT_ONCE))
        return np.concatenate([samples.batch(part)[1][axis] for part in parts]).astype(np.str_)
    value_of = {s.id: str(s.metadata[axis]) for s in sequences if axis in s.metadata}
    if not value_of:
        known = sorted({*samples.slices, *(key for s in sequences for key in s.metadata)})
        raise ConfigError("no sample has such an axis", where=f"mixture axis {axis!r}", expected=", ".join(known))
    return np.array([value_of.get(name.rpartition("/")[0], ABSENT) for name in samples.ids])


def rates_of(recipe: MixtureRecipe, samples: Samples, sequences: Sequence[SequenceInfo]) -> Array:
    """float64 (N,), mean 1: weight times the stratum's temperature factor, within the bounds.

    Raises:
        ConfigError: an axis or a value is nowhere in the data.
    """
    values = {axis: axis_values(samples, axis, sequences) for axis in recipe.used_axes()}
    wanted_N = np.ones(len(samples))
    for axis, weights in recipe.weights.items():
        wanted_N *= _weights(axis, weights, values[axis])
    if recipe.axes:
        wanted_N *= temperature_factors([values[axis] for axis in recipe.axes], recipe.temperature)
    return bounded(wanted_N, recipe.max_oversampling)


def _weights(axis: str, weights: Mapping[str, float], value_N: Array) -> Array:
    if unknown := sorted(set(weights) - set(value_N.tolist())):
        known = ", ".join(sorted(set(value_N.tolist()))[:12])
        raise ConfigError(f"no sample has {axis} {unknown[0]!r}", where=f"mixture weights.{axis}", expected=known)
    return np.array([weights.get(value, 1.0) for value in value_N.tolist()])


def temperature_factors(axes: Sequence[Array], temperature: float) -> Array:
    """(N,): what takes strata of natural share q to shares in proportion to q^(1/T) (arXiv:1907.05019, section 4.2)."""
    label_N = np.array(["\x1f".join(row) for row in zip(*(axis.tolist() for axis in axes), strict=True)])
    _, stratum_N, count_S = np.unique(label_N, return_inverse=True, return_counts=True)
    share_S = count_S / count_S.sum()
    return np.asarray((share_S ** (1 / temperature - 1))[stratum_N])


def bounded(wanted_N: Array, most: float) -> Array:
    """Rates in proportion to `wanted_N` as far as 1/most .. most allows, with mean 1.

    The factor is found by bisection: the mean of the clipped rates grows with it.
    """
    low, high = 1.0 / (most * wanted_N.max()), most / wanted_N.min()
    for _ in range(STEPS):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if np.clip(middle * wanted_N, 1 / most, most).mean() < 1 else (low, middle)
    rate_N = np.clip(high * wanted_N, 1 / most, most)
    return np.asarray(rate_N / rate_N.mean())
