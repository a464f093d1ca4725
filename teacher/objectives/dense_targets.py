"""What is predicted of features: those of the moving average, now and later, such that what is rare counts as well.

Most of a driving picture is road, and random features of it are about road: vehicles are 3 to 7 % of their variance.
Where every input channel is divided by its standard deviation before the encoder sees it, they are 19 % in the finest
map of the teacher of `bev-occupancy` (measured, docs/objectives.md). Of the features each place's mean is taken away:
with convolutions on a fixed grid most of them says where a cell is, not what is there.

Legend: B samples, A frames ahead, F frames of one input, K sensor planes, C channels, H W rows and columns,
N tokens (places), Q cells of a map in one token,
V = C * Q, X = B * A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fmdeploy.errors import ConfigError
from fmdeploy.models import input_list
from fmdeploy.models.tokens import TokenBackbone
from fmdeploy.task import Arrays, Samples, Task
from fmdeploy.teacher.objectives.frames import Recorded
from fmdeploy.teacher.objectives.masking import Index
from fmdeploy.teacher.objectives.predictor import patches_of
from fmdeploy.training.distributed import sum_over_ranks

FLAT = 0.01  # standard deviation below which a channel is not stretched any more
TINY = 1e-6


def inputs_ahead(task: Task, samples: Samples, index: Index, ahead: Sequence[int], *, name: str) -> Arrays:
    """Inputs as they will be after so many frames: uint8 (B, A * C, H, W) each, A in the order of `ahead`.

    `name` is that of the objective, for messages.

    Raises:
        ConfigError: the samples are single pictures, or their planes are not the task's inputs.
    """
    if not isinstance(samples, Recorded):
        raise ConfigError("needs the frames after each sample, and this task has none", where=f"objective {name}",
                          found=task.name, expected="samples with `frames`", fix=f"Set {name}.ahead=[0]")
    past = task.frames
    planes_BFKHW = samples.frames(index, range(1 - past + min(ahead), max(ahead) + 1))
    counts = [spec.shape[0] // past for spec in task.io.inputs]
    if sum(counts) != planes_BFKHW.shape[2] or any(spec.shape[0] % past for spec in task.io.inputs):
        raise ConfigError("the planes of a frame do not make up the inputs", where=f"objective {name}",
                          expected=f"{sum(counts)} planes, {past} frames", found=planes_BFKHW.shape[2],
                          fix=f"Set {name}.ahead=[0]")
    found: Arrays = {}
    for spec, first, count in zip(task.io.inputs, np.cumsum([0, *counts]), counts, strict=False):
        own = planes_BFKHW[:, :, first : first + count]
        stacks = [own[:, k - min(ahead) : k - min(ahead) + past] for k in ahead]
        found[spec.name] = np.concatenate(stacks, axis=1).reshape(len(index), -1, *spec.shape[1:])
    return found


@torch.no_grad()
def cell_targets(task: Task, average: TokenBackbone, whole: Mapping[str, Tensor], *, ahead: int) -> Tensor:
    """What the average finds in the cells of its finest map, standardised: (B, A, N, C, Q).

    Args:
        task: Whose inputs these are.
        average: The moving average of the backbone.
        whole: Each input, now and ahead, (B, A * its channels, H, W).
        ahead: A.
    """
    frames = {spec.name: evened(whole[spec.name].float().reshape(-1, *spec.shape)) for spec in task.io.inputs}
    channels, _ = average.finest_size
    cells_XNV = patches_of(average.finest(*input_list(task.io, frames)).float(), average.side)
    return standardised(cells_XNV.reshape(-1, ahead, cells_XNV.shape[1], channels, cells_XNV.shape[2] // channels))


def evened(x_BCHW: Tensor) -> Tensor:
    """Each channel divided by its standard deviation over the cells of all processes' samples."""
    count_C = x_BCHW.new_full(x_BCHW.shape[1:2], x_BCHW[:, 0].numel())
    sums_3C = torch.stack((count_C, x_BCHW.sum((0, 2, 3)), x_BCHW.square().sum((0, 2, 3))))
    count_C, total_C, square_C = sum_over_ranks(sums_3C)
    deviation_C = (square_C / count_C - (total_C / count_C).square()).clamp_min(0).sqrt()
    scale_C11: Tensor = deviation_C.clamp_min(FLAT)[:, None, None]
    return x_BCHW / scale_C11


def standardised(x_BANCQ: Tensor) -> Tensor:
    """Features without the mean of their place, each channel of variance 1, both over all processes' samples.

    The mean square error of a prediction then is the share of the variance that it leaves unexplained, all channels
    alike. A single sample has no mean worth taking away.
    """
    count = sum_over_ranks(x_BANCQ.new_tensor(float(len(x_BANCQ))))
    mean_ANCQ = sum_over_ranks(x_BANCQ.sum(0)) / count
    centred = x_BANCQ - mean_ANCQ * (count > 1)
    each = count * (centred[0].numel() / centred.shape[3])
    variance_C = sum_over_ranks(centred.square().sum((0, 1, 2, 4))) / each
    return centred / (variance_C + TINY).sqrt()[:, None]
