"""Dense linear probe: from each place of the feature map to the cells that it covers, one linear map for all places.

Every plane gets the ridge strength and the threshold with which its pooled IoU on val is the largest. What a bin of the
histogram below loses is bounded by its width of 0.005 in the score.

Legend: N samples, D channels, h w places of the map, C planes, H W cells, p q cells of a place, R = N h w rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fmdeploy.arrays import Array
from fmdeploy.evaluate.metrics import IoU
from fmdeploy.teacher.probe.base import NotMeasuredError, View
from fmdeploy.teacher.probe.labels import dense_planes
from fmdeploy.teacher.probe.ridge import Linear, Moments, fit_ridge

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
BINS = 200
CHUNK = 128  # samples
AXIS = "scenario"


@dataclass(frozen=True)
class Dense:
    """A fitted probe: scores minus thresholds, so that above zero means occupied.

    Attributes:
        linear: Rows (R, D) to (R, C p q).
        strengths: Ridge strength of each plane.
        thresholds: Of each plane's score.
    """

    linear: Linear
    strengths: tuple[float, ...]
    thresholds: tuple[float, ...]


def half_of(view: View, split: str) -> Array:
    """Domain 0 or 1 (N,) of each sample: every second scenario in alphabetical order, as the train split has them."""
    names = np.unique(view.labels("train", AXIS)).tolist()
    place = {name: number % 2 for number, name in enumerate(names)}
    return np.array([place.get(name, 0) for name in view.labels(split, AXIS).tolist()], np.int64)


def fit(view: View, halves: tuple[int, ...] | None = None) -> Dense:
    """The probe trained on all train samples, or on those of some halves; kept for the next rung that asks.

    Raises:
        NotMeasuredError: no features, no planes, or no samples of these halves.
    """
    return view.once(("dense fit", halves), lambda: _fit(view, halves))


def statistics(view: View, halves: tuple[int, ...] | None = None) -> Array:
    """Statistics (N, 2 C) of every plane's IoU on test, by the probe of `fit`."""
    return view.once(("dense statistics", halves), lambda: _statistics(view, fit(view, halves)))


def plane_statistics(stats: Array, channels: tuple[int, ...]) -> Array:
    """Of statistics (N, 2 C) those of some planes: intersections, then unions."""
    count = stats.shape[1] // 2
    return stats[:, [*channels, *(count + c for c in channels)]]


def _fit(view: View, halves: tuple[int, ...] | None) -> Dense:
    moments = _moments(view, halves)
    tried = [_tables(view, linear, halves) for linear in fit_ridge(moments, STRENGTHS)]
    best = [max(range(len(STRENGTHS)), key=lambda k: tried[k][1][c]) for c in range(len(tried[0][1]))]
    thresholds = tuple(tried[k][2][c] for c, k in enumerate(best))
    cells = tried[0][0].bias_T.numel() // len(best)
    parts = [tried[k][0] for k in best]
    weights = torch.cat([p.weights_DT[:, c * cells : (c + 1) * cells] for c, p in enumerate(parts)], 1)
    bias = torch.cat([p.bias_T[c * cells : (c + 1) * cells] - thresholds[c] for c, p in enumerate(parts)])
    return Dense(Linear(weights, bias), tuple(STRENGTHS[k] for k in best), thresholds)


def _moments(view: View, halves: tuple[int, ...] | None) -> Moments:
    wanted: tuple[int | None, ...] = (None,) if halves is None else halves
    each = [view.once(("moments", half), partial(_summed, view, half)) for half in wanted]
    return sum(each[1:], start=each[0])


def _summed(view: View, half: int | None) -> Moments:
    total: Moments | None = None
    for x_RD, y_RT in rows_of(view, "train", _chosen(view, "train", None if half is None else (half,))):
        part = Moments.of(x_RD, y_RT)
        total = part if total is None else total + part
    assert total is not None
    return total


def _chosen(view: View, split: str, halves: tuple[int, ...] | None) -> Array:
    count = len(view.index(split))
    found = np.arange(count) if halves is None else np.flatnonzero(np.isin(half_of(view, split), halves))
    if not len(found):
        raise NotMeasuredError(f"the {split} split has no samples of this half of the scenarios")
    return found


def rows_of(view: View, split: str, chosen: Array) -> Iterator[tuple[Tensor, Tensor]]:
    """Features (R, D) and labels (R, C p q) of some samples, a chunk at a time.

    Raises:
        NotMeasuredError: the cells do not divide among the places of the map.
    """
    maps, targets = view.maps(split), view.targets(split)[dense_planes(view.subject.task).output]
    require_whole(maps.shape[2:], targets.shape[2:])
    for at in range(0, len(chosen), CHUNK):
        part = chosen[at : at + CHUNK]
        x_NDhw = maps[torch.from_numpy(part)].float()
        yield x_NDhw.permute(0, 2, 3, 1).flatten(0, 2), _folded(targets[part], x_NDhw.shape[2:])


def require_whole(places: tuple[int, ...], cells: tuple[int, ...]) -> None:
    """Check that each place of the map covers whole cells."""
    if any(c % p for c, p in zip(cells, places, strict=True)):
        raise NotMeasuredError(f"a map of {tuple(places)} does not divide {tuple(cells)} cells")


def _folded(labels_NCHW: Array, places: tuple[int, ...]) -> Tensor:
    """Labels as rows (N h w, C p q)."""
    n, c, height, width = labels_NCHW.shape
    h, w = places
    rows = labels_NCHW.reshape(n, c, h, height // h, w, width // w).transpose(0, 2, 4, 1, 3, 5)
    return torch.from_numpy(np.ascontiguousarray(rows != 0).astype(np.float32)).reshape(n * h * w, -1)


def unfolded(scores_RT: Tensor, places: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """Scores (N h w, C p q) as planes (N, C, H, W)."""
    (h, w), (c, height, width) = places, shape
    rows = scores_RT.reshape(-1, h, w, c, height // h, width // w).permute(0, 3, 1, 4, 2, 5)
    return rows.reshape(-1, c, height, width).numpy()


def _tables(view: View, linear: Linear, halves: tuple[int, ...] | None) -> tuple[Linear, list[float], list[float]]:
    """The fit, and for each plane its best IoU on val and the threshold that gives it."""
    planes = len(view.targets("val")[dense_planes(view.subject.task).output][0])
    counts_2CM = np.zeros((2, planes, BINS))
    for x_RD, y_RT in rows_of(view, "val", _chosen(view, "val", halves)):
        slots = (linear(x_RD) * BINS).clamp(0, BINS - 1).long()
        y_RCK = y_RT.reshape(len(y_RT), planes, -1).bool()
        slots_RCK = slots.reshape(y_RCK.shape)
        for plane in range(planes):
            for label in (0, 1):
                found = slots_RCK[:, plane][y_RCK[:, plane] == bool(label)]
                counts_2CM[label, plane] += torch.bincount(found, minlength=BINS).numpy()
    above_2CM = counts_2CM[..., ::-1].cumsum(-1)[..., ::-1]
    iou_CM = above_2CM[1] / np.maximum(counts_2CM[1].sum(-1, keepdims=True) + above_2CM[0], 1)
    best_C = iou_CM.argmax(-1)
    return linear, iou_CM.max(-1).tolist(), (best_C / BINS).tolist()


def _statistics(view: View, dense: Dense) -> Array:
    output = dense_planes(view.subject.task).output
    truth = view.targets("test")[output]
    metric = IoU("planes", "probe", "label", tuple(range(truth.shape[1])))
    everything, found, at = np.arange(len(truth)), [], 0
    for x_RD, _ in rows_of(view, "test", everything):
        planes = unfolded(dense.linear(x_RD), tuple(view.maps("test").shape[2:]), truth.shape[1:])
        found.append(metric.statistics({"probe": planes}, {"label": truth[at : at + len(planes)]}))
        at += len(planes)
    return np.concatenate(found)
