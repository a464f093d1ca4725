"""Leakage by content: frames of two splits that look the same."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.data.format import Dataset
from fmdeploy.data.leakage import Leak
from fmdeploy.data.phash import Signatures, near_pairs


def leaks_of_content(data: Dataset, found: Signatures) -> list[Leak]:
    """Sequences in two splits that have near-duplicate frames, each pair with its closest frames."""
    numbers = {sequence.id: number for number, sequence in enumerate(data.sequences)}
    leaks = []
    for a, b in combinations(data.splits, 2):
        rows = [_rows(found, {numbers[i] for i in data.splits[name]}) for name in (a, b)]
        closest: dict[tuple[int, int], tuple[int, int, int, int]] = {}
        for i, j, bits in near_pairs(found, *rows):
            pair = int(found.sequence_S[i]), int(found.sequence_S[j])
            count = closest.get(pair, (0, 0, 0, 0))[3] + 1
            best = min((bits, i, j), closest[pair][:3]) if pair in closest else (bits, i, j)
            closest[pair] = (*best, count)
        for (one, other), (bits, i, j, count) in sorted(closest.items()):
            frames = f"{found.frame_S[i]} and {found.frame_S[j]}"
            leaks.append(Leak(
                "near-duplicate frames", (data.sequences[one].id, data.sequences[other].id),
                f"{count} pairs, closest frames {frames} differ in {bits} of {found.bits_SK.shape[1]} bits", (a, b),
            ))
    return [leak for leak in leaks if leak.samples[0] != leak.samples[1]]


def _rows(found: Signatures, numbers: set[int]) -> Array:
    return np.flatnonzero(np.isin(found.sequence_S, sorted(numbers)))
