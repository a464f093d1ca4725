"""Place recognition: does the nearest other frame show the same place?

The database is every test frame. A frame of the query's own recording that is closer in time than 8 frames is left out:
it shares sensor sweeps with the query. Frames of the same simulation that remain (another time, or the other ego) are
right, all others distractors. Similarity is the cosine of standardised pooled features.

recall@1 is the share of queries whose nearest frame is right; mAP the mean of (1 / P) Σ precision at each right frame
(Manning, Raghavan and Schütze 2008, section 8.4). Queries without a right frame do not count.

Legend: N queries, which are also the database.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import normalize

from fmdeploy.arrays import Array
from fmdeploy.task import Metric
from fmdeploy.teacher.probe.base import Bench, Judged, NotMeasuredError, StatisticsRung, View
from fmdeploy.teacher.probe.pooled import Mean, counted, standardised

APART = 8  # frames: a sample reads 4 past ones and its labels reach 8 ahead
CHUNK = 256


class Retrieval(StatisticsRung):
    """Recall@1 of the same place, with mAP beside it."""

    name = "retrieval"
    metric_name = "recall@1"

    def metric(self) -> Metric:
        """Recall@1."""
        return Mean("recall@1")

    def judge(self, view: View, bench: Bench) -> Judged:
        """See `StatisticsRung.judge`."""
        samples, index = view.samples("test"), view.index("test")
        places = np.asarray(samples.groups)[index]
        recordings, times = recorded([samples.ids[int(k)] for k in index])
        vectors = normalize(standardised(view, "test"), dim=1)
        first, precision = ranked(vectors, places, recordings, times)
        asked = np.flatnonzero(np.isfinite(precision))
        if not len(asked) or len(np.unique(places)) < 2:
            raise NotMeasuredError("no test frame has another one of its place, or there is one place only")
        also = Mean("mAP")
        return Judged(
            view.evaluation(self.metric(), counted(first[asked]), index=index[asked]),
            also={"mAP": (also, view.evaluation(also, counted(precision[asked]), index=index[asked]))},
        )


def recorded(ids: list[str]) -> tuple[Array, Array]:
    """Number of its recording and frame number of each sample, from `<recording>/<frame>`.

    Raises:
        NotMeasuredError: the names are others.
    """
    parts = [name.rpartition("/") for name in ids]
    if odd := [name for name, p in zip(ids, parts, strict=True) if not p[2].isdecimal()]:
        raise NotMeasuredError(f"the sample {odd[0]!r} does not say which frame of a recording it is")
    numbers = {name: number for number, name in enumerate(dict.fromkeys(p[0] for p in parts))}
    return np.array([numbers[p[0]] for p in parts]), np.array([int(p[2]) for p in parts])


def ranked(vectors_NP: torch.Tensor, places: Array, recordings: Array, times: Array) -> tuple[Array, Array]:
    """Whether the nearest frame is right, and the average precision, of every query (N,); NaN where none is right."""
    place, recording, time = (torch.from_numpy(np.asarray(a, np.int64)) for a in (places, recordings, times))
    first, precision = [], []
    for at in range(0, len(vectors_NP), CHUNK):
        part = slice(at, at + CHUNK)
        similar = vectors_NP[part] @ vectors_NP.T
        hidden = (recording[part, None] == recording) & ((time[part, None] - time).abs() < APART)
        order = similar.masked_fill(hidden, -torch.inf).argsort(dim=1, descending=True, stable=True)
        right = ((place[part, None] == place) & ~hidden).gather(1, order).double()
        count = right.sum(1)
        position = torch.arange(1, right.shape[1] + 1)
        average = (right * right.cumsum(1) / position).sum(1) / count
        first.append(torch.where(count > 0, right[:, 0], torch.nan))
        precision.append(torch.where(count > 0, average, torch.nan))
    return torch.cat(first).numpy(), torch.cat(precision).numpy()
