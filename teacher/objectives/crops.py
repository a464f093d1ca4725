"""Views of one frame for self-distillation: what may change without changing what the scene is.

The grid is the ego's own, with up meaning ahead, so views are not turned by right angles. A *global* view is the
whole grid: the first as it stands, which is how the backbone will be used, the second zoomed, shifted and turned a
little. A *local* view is moved too, and only a window of its tokens is seen (the rest of the grid is blank and stays
out of the transformer). The student sees its views degraded: one sensor missing, cells lost, and, in global ones,
patches hidden. The teacher sees the global views whole.

All of it is drawn in numpy from one generator a sample (`draw_views`) and applied on the device (`Views`).

Legend: B samples, V views (first G global, then L local), N tokens, K tokens of a window, C channels, H W cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from pydantic import Field
from torch import Tensor

from fmdeploy.task import Array, Arrays
from fmdeploy.teacher.objectives.collapse import CollapseConfig

GLOBAL = 2  # global views of a sample, as in every method of this family
STILL = 0  # the global view that is not moved: the grid as it will be used
WHOLE = -1  # no input is missing


class ViewConfig(CollapseConfig):
    """Options of the views."""

    local_views: int = Field(default=1, ge=0, description="small views of each sample, for the student alone")
    window: int = Field(default=4, ge=1, description="tokens a side of a local view")
    shift: float = Field(default=0.12, ge=0, le=0.5, description="largest shift, as a share of the grid")
    zoom: float = Field(default=0.15, ge=0, lt=1, description="largest change of scale")
    turn: float = Field(default=5.0, ge=0, le=45, description="largest turn, degrees")
    sensor_drop: float = Field(default=0.1, ge=0, lt=1, description="chance that a view lacks one of several inputs")
    cells_lost: float = Field(default=0.05, ge=0, lt=1, description="largest share of cells that see nothing")
    hidden: float = Field(default=0.3, ge=0, lt=1, description="share of patches hidden in a global view")


def draw_views(config: ViewConfig, rngs: Sequence[Generator], *, num_inputs: int, side: int, patch: int) -> Arrays:
    """The random numbers of all views of all samples.

    Returns:
        `affine` float32 (B, V, 2, 3), from places in a view to places in the grid, both in [-1, 1];
        `missing` int64 (B, V), the number of an input or WHOLE;
        `lost` bool (B, V, H, W), cells that see nothing;
        `hidden` bool (B, G, N), patches of the global views;
        `window` int64 (B, L, K), tokens of the local ones.
    """
    drawn = [_one_sample(config, rng, num_inputs, side, side * patch) for rng in rngs]
    return {name: np.stack([one[name] for one in drawn]) for name in drawn[0]}


def _one_sample(config: ViewConfig, rng: Generator, num_inputs: int, side: int, size: int) -> Arrays:
    views, window = GLOBAL + config.local_views, min(config.window, side)
    missing = np.where(rng.random(views) < config.sensor_drop, rng.integers(0, num_inputs, views), WHOLE)
    if num_inputs == 1:
        missing[:] = WHOLE
    share = rng.random(views) * config.cells_lost
    bytes_VHW = np.frombuffer(rng.bytes(views * size * size), np.uint8).reshape(views, size, size)
    corners = rng.integers(0, side - window + 1, (config.local_views, 2))
    square = np.arange(window)[:, None] * side + np.arange(window)
    return {
        "affine": np.stack([_affine(config, rng, still=view == STILL) for view in range(views)]),
        "missing": missing.astype(np.int64),
        "lost": bytes_VHW < np.floor(256 * share)[:, None, None],
        "hidden": np.stack([_blocks(rng, side, config.hidden) for _ in range(GLOBAL)]),
        "window": (corners[:, 0] * side + corners[:, 1])[:, None] + square.reshape(1, -1),
    }


def _affine(config: ViewConfig, rng: Generator, *, still: bool) -> Array:
    """Scale, turn and shift as a matrix (2, 3) for `affine_grid`; nothing of it for a view that stands still."""
    if still:
        return np.eye(2, 3, dtype=np.float32)
    across, ahead, scale, turn = rng.uniform(-1, 1, 4)
    angle, factor = np.deg2rad(config.turn * turn), 1 + config.zoom * scale
    cosine, sine = factor * np.cos(angle), factor * np.sin(angle)
    return np.array([[cosine, -sine, 2 * config.shift * across], [sine, cosine, 2 * config.shift * ahead]], np.float32)


def _blocks(rng: Generator, side: int, share: float) -> Array:
    """Hidden patches, bool (N,): rectangles until at least `share` are hidden, then the surplus is shown again.

    In blocks (arXiv:2106.08254, section 2.3), because a single hidden patch can be read off its neighbours.
    """
    wanted = round(share * side * side)
    mask = np.zeros((side, side), bool)
    order = rng.random((side, side))  # which patches of the surplus are shown again
    while mask.sum() < wanted:
        high, wide = rng.integers(1, max(2, side // 2) + 1, 2)
        top, left = rng.integers(0, side - high + 1), rng.integers(0, side - wide + 1)
        mask[top : top + high, left : left + wide] = True
    places = np.flatnonzero(mask.ravel())
    kept = places[np.argsort(order.ravel()[places])[:wanted]]
    flat = np.zeros(side * side, bool)
    flat[kept] = True
    return flat


class Views:
    """The views of a batch.

    Args:
        inputs: (B, C, H, W) each.
        drawn: From `draw_views`, as tensors.
        patch: Cells a side of a token.
    """

    def __init__(self, inputs: Sequence[Tensor], drawn: dict[str, Tensor], patch: int) -> None:
        self.drawn, self.patch = drawn, patch
        self.whole = [[moved(x, drawn["affine"][:, view]) for x in inputs] for view in range(drawn["affine"].shape[1])]

    def teacher(self) -> list[Tensor]:
        """Each input of the whole global views, (G B, C, H, W), view by view."""
        return _stacked(self.whole[:GLOBAL])

    def student(self) -> list[Tensor]:
        """Each input of the degraded global views, hidden patches blank, (G B, C, H, W)."""
        return _stacked([
            [torch.where(self._cells(self.drawn["hidden"][:, view]), 0.0, x) for x in self._degraded(view)]
            for view in range(GLOBAL)
        ])

    def local(self) -> tuple[list[Tensor], Tensor] | None:
        """Each input of the local views (L B, C, H, W), blank outside the window, and its tokens (L B, K)."""
        window_BLK = self.drawn["window"]
        if not window_BLK.shape[1]:
            return None
        views = []
        for view in range(window_BLK.shape[1]):
            seen_BN = torch.zeros_like(self.drawn["hidden"][:, 0]).scatter(1, window_BLK[:, view], True)
            cells_B1HW = self._cells(seen_BN)
            views.append([torch.where(cells_B1HW, x, 0.0) for x in self._degraded(GLOBAL + view)])
        return _stacked(views), window_BLK.transpose(0, 1).flatten(0, 1)

    def _degraded(self, view: int) -> list[Tensor]:
        """One view without the missing input and the lost cells."""
        seen_B1HW = ~self.drawn["lost"][:, view, None]
        missing_B = self.drawn["missing"][:, view]
        return [x * (seen_B1HW & (missing_B != number)[:, None, None, None])
                for number, x in enumerate(self.whole[view])]

    def _cells(self, tokens_BN: Tensor) -> Tensor:
        """Cells, bool (B, 1, H, W), from tokens, bool (B, N)."""
        side = round(tokens_BN.shape[1] ** 0.5)
        grid = tokens_BN.reshape(-1, 1, side, side)
        return grid.repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)


def moved(x_BCHW: Tensor, affine_B23: Tensor) -> Tensor:
    """The grid seen through `affine_B23`: nearest cell, zero outside, so that binary planes stay binary."""
    with torch.autocast(x_BCHW.device.type, enabled=False):
        grid = F.affine_grid(affine_B23, list(x_BCHW.shape), align_corners=False)
        return F.grid_sample(x_BCHW.float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)


def _stacked(views: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Each input of all views as one batch."""
    return [torch.cat(parts) for parts in zip(*views, strict=True)]
