"""Identifiers that predict labels: a probe that is trained on metadata alone.

Each key of the metadata (and the sequence's id) is given to a naive Bayes classifier beside the *context*: keys that
say what was driven, such as scenario and weather, and may well predict what is seen. A key that says more about a
label of held-out sequences than the context does is a leak waiting for a model that gets to see it: a path, a file
name, an exposure time, the length of a clip.

Classes have equal priors and the score is the mean recall of the classes, so rare labels count. A key is named when
its gain over the context is at least MIN_GAIN and the lower end of a 99 % interval over groups is above zero.

Legend: S sequences, K classes, G groups, D bootstrap draws.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.data.format import Dataset
from fmdeploy.data.leakage import Leak
from fmdeploy.data.samples import SLICE_PREFIX
from fmdeploy.data.sequence import SequenceInfo

CONTEXT = ("scenario", "place", "weather", "sensor_rig", "map_version", "ego")
TRAINING = "train"
MIN_GAIN = 0.05
TAIL = 0.005
DRAWS = 1000
MIN_SEQUENCES = 8
"""In training and held out, of each class that is probed."""
BINS = 8
MAX_CLASSES = 20
SMOOTHING = 0.5
WORD = re.compile(r"[A-Za-z]+|\d+")


@dataclass(frozen=True)
class Probed:
    """What the probe looked at and what it found."""

    leaks: tuple[Leak, ...]
    keys: tuple[str, ...]
    labels: tuple[str, ...]


def telling_metadata(data: Dataset, *, context: Sequence[str] = CONTEXT) -> Probed:
    """Keys of the metadata that predict labels of held-out sequences beyond the context."""
    training = set(data.splits.get(TRAINING, ()))
    held = {i for name, ids in data.splits.items() if name != TRAINING for i in ids}
    sequences = [s for s in data.sequences if s.id in training | held]
    if not training or not held:
        return Probed((), (), ())
    trains_S = np.array([s.id in training for s in sequences])
    values = {key: _column(sequences, key) for key in _keys(sequences)}
    known = [key for key in values if key in context]
    leaks, labels = [], []
    for name, label_S in sequence_labels(data, sequences, trains_S).items():
        chosen_S = _enough(label_S, trains_S)
        if chosen_S is None:
            continue
        labels.append(name)
        rows = [int(i) for i in np.flatnonzero(chosen_S)]
        table = _Table(label_S[rows], trains_S[rows], [sequences[i] for i in rows])
        base_SK = table.score([[values[key][i] for i in rows] for key in known])
        for key in (key for key in values if key not in context):
            leaks += table.judge(key, name, base_SK, table.score_of([values[key][i] for i in rows]))
    return Probed(tuple(leaks), tuple(key for key in values if key not in context), tuple(labels))


def sequence_labels(data: Dataset, sequences: Sequence[SequenceInfo], trains_S: Array) -> dict[str, Array]:
    """One class a sequence for each label: rare cases (any), classes (majority), dense labels (above the median)."""
    found: dict[str, list[float]] = defaultdict(list)
    for sequence in sequences:
        for name, value in _summaries(data.arrays(sequence)):
            found[name].append(value)
    whole = {name: np.array(values) for name, values in found.items() if len(values) == len(sequences)}
    return {name: (values > np.median(values[trains_S])).astype(np.int64) if name.startswith("mean ")
            else values.astype(np.int64) for name, values in whole.items()}


def _summaries(arrays: Arrays) -> Iterable[tuple[str, float]]:
    for name, array in sorted(arrays.items()):
        if name.startswith(SLICE_PREFIX) or not len(array):
            continue
        if array.ndim == 1 and array.dtype == np.bool_:
            yield name, float(array.any())
        elif array.ndim == 1 and array.dtype.kind in "iu" and array.min() >= 0 and array.max() < 10_000:
            yield name, float(np.bincount(array.astype(np.int64)).argmax())
        elif name == "occupancy" and array.dtype == np.uint8:
            yield f"mean {name}", float(np.unpackbits(array).mean())


def _enough(label_S: Array, trains_S: Array) -> Array | None:
    """Which sequences have a class that is frequent enough on both sides; None where that leaves fewer than two."""
    usable = [value for value in np.unique(label_S)
              if min(np.sum((label_S == value) & side) for side in (trains_S, ~trains_S)) >= MIN_SEQUENCES]
    if not 2 <= len(usable) <= MAX_CLASSES:
        return None
    return np.asarray(np.isin(label_S, usable))


def _keys(sequences: Sequence[SequenceInfo]) -> list[str]:
    """`id` and all keys that every sequence has."""
    shared = set.intersection(*(set(s.metadata) for s in sequences))
    return ["id", "frames", "shard", *sorted(shared - {"id", "frames", "shard"})]


def _column(sequences: Sequence[SequenceInfo], key: str) -> list[Any]:
    if key in ("id", "frames", "shard"):
        return [getattr(sequence, key) for sequence in sequences]
    return [sequence.metadata[key] for sequence in sequences]


class _Table:
    """The sequences of one label that are probed."""

    def __init__(self, label_S: Array, trains_S: Array, sequences: Sequence[SequenceInfo]) -> None:
        self.classes, self.label_S = np.unique(label_S, return_inverse=True)
        self.trains_S, self.sequences = trains_S, sequences
        names = {name: number for number, name in enumerate(dict.fromkeys(s.group for s in sequences))}
        self.group_S = np.array([names[s.group] for s in sequences])

    def score(self, columns: Sequence[Sequence[Any]]) -> Array:
        """Log-probabilities (S, K), up to a constant, of naive Bayes on some columns; zeros for none."""
        total_SK: Array = np.zeros((len(self.label_S), len(self.classes)))
        for column in columns:
            total_SK = total_SK + self.score_of(column)
        return total_SK

    def score_of(self, column: Sequence[Any]) -> Array:
        """The share (S, K) of one column; words that training has not seen say nothing."""
        words = _words(column, self.trains_S)
        count: Mapping[str, Array] = defaultdict(lambda: np.zeros(len(self.classes)))
        total_K = np.zeros(len(self.classes))
        for found, label, trains in zip(words, self.label_S, self.trains_S, strict=True):
            total_K[label] += trains
            for word in found if trains else ():
                count[word][label] += 1
        rate = {w: np.log((c + SMOOTHING) / (total_K + 2 * SMOOTHING)) for w, c in count.items() if c.sum() > 1}
        zero_K = np.zeros(len(self.classes))
        return np.array([np.sum([rate.get(word, zero_K) for word in found], axis=0) + zero_K for found in words])

    def judge(self, key: str, label: str, base_SK: Array, own_SK: Array) -> list[Leak]:
        """A leak, where the key says more than the context."""
        test_S = ~self.trains_S
        right_2S = [(score.argmax(axis=1) == self.label_S)[test_S] for score in (base_SK, base_SK + own_SK)]
        before, after, low = self._gain(right_2S[0], right_2S[1], test_S)
        if after - before < MIN_GAIN or low <= 0:
            return []
        why = (f"{key!r} predicts the label {label!r} of held-out sequences: mean recall {after:.2f}, "
               f"{before:.2f} by the context alone")
        return [Leak("telling metadata", tuple(s.id for s, t in zip(self.sequences, test_S, strict=True) if t), why,
                     (TRAINING, "held out"))]

    def _gain(self, before_S: Array, after_S: Array, test_S: Array) -> tuple[float, float, float]:
        """Mean recall before and after, and the lower end of the gain's interval over groups."""
        label_S, group_S = self.label_S[test_S], np.unique(self.group_S[test_S], return_inverse=True)[1]
        groups = int(group_S.max()) + 1
        sums_3GK = np.zeros((3, groups, len(self.classes)))
        for row, values in enumerate((before_S, after_S, np.ones(len(label_S)))):
            np.add.at(sums_3GK[row], (group_S, label_S), values)
        draws_DG = np.random.default_rng(0).multinomial(groups, np.full(groups, 1 / groups), DRAWS)

        def recall(weights: Array, row: int) -> Array:
            hits, count = weights @ sums_3GK[row], weights @ sums_3GK[2]
            with np.errstate(invalid="ignore", divide="ignore"):
                return np.asarray(np.nanmean(np.where(count > 0, hits / count, np.nan), axis=-1))

        everyone = np.ones(groups)
        gain_D = recall(draws_DG, 1) - recall(draws_DG, 0)
        return float(recall(everyone, 0)), float(recall(everyone, 1)), float(np.quantile(gain_D, TAIL))


def _words(column: Sequence[Any], trains_S: Array) -> list[list[str]]:
    """What a value consists of: its words and numbers by place, and for numbers the bin among those of training."""
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in column):
        values_S = np.array(column, np.float64)
        edges = np.unique(np.quantile(values_S[trains_S], np.linspace(0, 1, BINS + 1)[1:-1]))
        bin_S = np.searchsorted(edges, values_S)
        return [[f"={value:g}", f"bin {k}"] for value, k in zip(values_S, bin_S, strict=True)]
    split = [WORD.findall(str(value)) for value in column]
    return [[*(f"{place}:{word}" for place, word in enumerate(found)), f"whole {value}"]
            for found, value in zip(split, column, strict=True)]
