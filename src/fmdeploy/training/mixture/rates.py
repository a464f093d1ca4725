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
CLOSE = 1e-9  # share of a rate that rounding may cost


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


def with_share(rate_N: Array, old_N: Array, share: float, most: float | None) -> Array:
    """Rates such that the old domains together get `share` of the draws; within each side in proportion to `rate_N`.

    Args:
        rate_N: Rates as the recipe wants them, mean 1.
        old_N: Bool, which samples are of old domains; of both kinds there are some.
        share: Of all draws.
        most: Bound on the rates of all draws together, and its inverse below; None: there is none.

    Raises:
        ConfigError: a side's mean rate, which the share fixes, is outside the bounds.
    """
    found_N = rate_N.copy()
    for name, side_N, part in (("old", old_N, share), ("new", ~old_N, 1 - share)):
        mean = part * len(rate_N) / side_N.sum()
        if most is None:
            found_N[side_N] *= mean / rate_N[side_N].mean()
            continue
        if not (1 - CLOSE) / most <= mean <= (1 + CLOSE) * most:
            raise ConfigError(
                f"a replay share of {share:g} draws the {side_N.sum():,} {name} of {len(rate_N):,} samples "
                f"{mean:.3g} times as often as naturally", where="mixture max_oversampling",
                expected=f"{1 / most:.3g} .. {most:g}", fix=_ways_out(share, float(old_N.mean()), most))
        found_N[side_N] = bounded(rate_N[side_N], most, mean)
    return found_N


def _ways_out(share: float, natural: float, most: float) -> str:
    """What would make a share and a bound agree, where `natural` is the old domains' share of the samples."""
    low, high = max(natural / most, 1 - (1 - natural) * most), min(natural * most, 1 - (1 - natural) / most)
    nearest = np.ceil(low * 1e4) / 1e4 if share < low else np.floor(high * 1e4) / 1e4
    means = (share / natural, (1 - share) / (1 - natural))
    bound = np.ceil(max(*means, *(1 / mean for mean in means)) * 100) / 100
    fits = low <= nearest <= high and nearest > 0  # not where the bound is next to 1, and few shares agree with it
    return f"Set max_oversampling = {bound:g} or more" + (f", or --replay-share {nearest:g}" if fits else "")


def bounded(wanted_N: Array, most: float, mean: float = 1.0) -> Array:
    """Rates in proportion to `wanted_N` as far as 1/most .. most allows, with the given mean, which lies between.

    The factor is found by bisection: the mean of the clipped rates grows with it.
    """
    low, high = 1.0 / (most * wanted_N.max()), most / wanted_N.min()
    for _ in range(STEPS):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if np.clip(middle * wanted_N, 1 / most, most).mean() < mean else (low, middle)
    rate_N = np.clip(high * wanted_N, 1 / most, most)
    return np.asarray(rate_N * (mean / rate_N.mean()))
