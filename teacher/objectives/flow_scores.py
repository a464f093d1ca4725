"""How good drawn futures are: overlap, and whether their probabilities can be believed.

Legend: B samples, H horizons, h w rows and columns of the grid of futures, K statistics of a sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from fmdeploy.evaluate.metrics import ECE, Array, Arrays, IoU, SoftIoU, sigmoid
from fmdeploy.task import Metric, Samples
from fmdeploy.teacher.objectives.flow import HIT, VEHICLE, Flow, reduced
from fmdeploy.teacher.objectives.frames import Recorded
from fmdeploy.training.sampler import Index

LARGEST_LOGIT = 12.0  # of a chance of 0 or 1, which a share of few futures often is


@dataclass
class Brier:
    """Mean squared error of probabilities (Brier, Monthly Weather Review 78, 1950). Statistics: (sum, count)."""

    name: str = "brier"
    output: str = "bev"
    target: str = "bev"
    higher_is_better: bool = field(default=False, init=False)

    def statistics(self, outputs: Arrays, targets: Arrays) -> Array:
        """Return (B, 2): squared errors of all cells, and their number."""
        chance = sigmoid(outputs[self.output]).reshape(len(outputs[self.output]), -1).astype(np.float64)
        truth = (targets[self.target] != 0).reshape(chance.shape)
        return np.stack([np.square(chance - truth).sum(1), np.full(len(chance), float(chance.shape[1]))], axis=1)

    def value(self, total: Array) -> Array:
        """Return sum / count."""
        return np.asarray(total[..., 0] / total[..., 1])


def future_metrics(horizons: int) -> tuple[Metric, ...]:
    """IoU at probability 0.5, IoU of probabilities, Brier score and calibration error, over all horizons together."""
    channels = tuple(range(horizons))
    return IoU("iou", channels=channels), SoftIoU("soft_iou", channels=channels), Brier(), ECE(channels=channels)


def future_statistics(probability: Array, truth: Array) -> dict[str, Array]:
    """Statistics (B, K) of every metric, whose sums over samples give its value.

    Args:
        probability: float (B, H, h, w).
        truth: (B, H, h, w), zero where nothing is.
    """
    chance = np.clip(np.asarray(probability, np.float64), np.exp(-LARGEST_LOGIT), 1 - np.exp(-LARGEST_LOGIT))
    outputs = {"bev": np.log(chance / (1 - chance))}
    return {m.name: m.statistics(outputs, {"bev": truth}) for m in future_metrics(probability.shape[1])}


def future_scores(probability: Array, truth: Array) -> dict[str, float]:
    """Value of every metric of `future_metrics`."""
    stats = future_statistics(probability, truth)
    return {m.name: float(m.value(stats[m.name].sum(0))) for m in future_metrics(probability.shape[1])}


def judge_futures(
    flow: Flow, teacher: nn.Module, samples: Samples, index: Index, *, futures: int = 8, seed: int = 0, batch: int = 32,
) -> Mapping[str, dict[str, float]]:
    """Scores of the drawn futures against what was observed, beside two answers that need no network.

    Over the horizons that lie ahead: the present, where it is one of them, is no forecast.

    Returns:
        `flow`; `copy`, what is observed now said of every horizon; `rate`, the mean of each horizon in each cell over
        these very samples, which no forecast without inputs can beat.
    """
    said, truth, copied = [], [], []
    for start in range(0, len(index), batch):
        part = index[start : start + batch]
        inputs = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in samples.batch(part)[0].items()}
        said.append(flow.predict_future(teacher, inputs, samples=futures, seed=seed + start).cpu().numpy())
        truth.append(flow.observed(samples, part))
        copied.append(_present(flow, samples, part))
    actual = np.concatenate(truth)
    rate = np.broadcast_to(actual.mean(0, dtype=np.float64), actual.shape)
    answers = {"flow": np.concatenate(said), "copy": np.concatenate(copied), "rate": rate}
    later = [place for place, ahead in enumerate(flow.config.horizons) if ahead] or [0]
    return {name: future_scores(answer[:, later], actual[:, later]) for name, answer in answers.items()}


def _present(flow: Flow, samples: Samples, index: Index) -> Array:
    assert isinstance(samples, Recorded)
    now = samples.frames(index, (0,))
    seen = reduced(now[:, :, HIT] | now[:, :, VEHICLE], flow.config.reduce)
    return np.repeat(seen, len(flow.config.horizons), axis=1)
