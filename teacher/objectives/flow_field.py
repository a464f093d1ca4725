"""The velocity field of flow matching: which way a half-noisy future moves, given what the backbone saw.

Cells are folded into channels (2 x 2 of them), so that the network runs at half the grid's side and at the side of the
backbone's tokens. The tokens enter twice: spread out over their own cells, and at their own resolution.

Legend: B futures, H horizons, h w rows and columns of the grid of futures, F folded channels (4 H), C channels,
N tokens, D embedding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmdeploy.models.blocks import GROUPS

FOLD = 2  # cells a side that become channels
MEAN, STD = -0.95, 0.3  # of cells that are -1 or 1 and seldom occupied; only how fast it learns depends on them
WAVES = 32  # numbers that describe a time


class Modulated(nn.Module):
    """A residual block whose normalised features are scaled and shifted by the time (FiLM, arXiv:1709.07871)."""

    def __init__(self, channels: int, time: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = nn.Linear(time, 2 * channels)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def forward(self, x_BCHW: Tensor, time_BC: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        scale_BC, shift_BC = self.film(time_BC).chunk(2, dim=1)
        y_BCHW = self.norm(self.first(x_BCHW)) * (1 + scale_BC[..., None, None]) + shift_BC[..., None, None]
        moved_BCHW: Tensor = x_BCHW + self.second(F.silu(y_BCHW))
        return moved_BCHW


class VelocityField(nn.Module):
    """v(x, t | tokens): a small U-Net of two levels.

    Args:
        horizons: H.
        dim: D.
        side: Tokens a side.
        cells: Rows (and columns) of the grid of futures; `side * FOLD` times a whole number.
        width: Channels at the finer level.

    Raises:
        ValueError: the grid does not divide.
    """

    def __init__(self, horizons: int, dim: int, side: int, cells: int, width: int) -> None:
        super().__init__()
        self.side, self.cells, self.up = side, cells, cells // FOLD // side
        if self.up * FOLD * side != cells:
            raise ValueError(f"a grid of {cells} cells does not divide into {side} tokens of {FOLD} cells")
        time, folded = 4 * WAVES, horizons * FOLD**2
        self.time = nn.Sequential(nn.Linear(WAVES, time), nn.SiLU(), nn.Linear(time, time))
        self.enter = nn.Conv2d(folded, width, 3, padding=1)
        self.spread = nn.Linear(dim, width * self.up**2)
        self.fine = Modulated(width, time)
        self.down = nn.Conv2d(width, 2 * width, self.up, stride=self.up)
        self.know = nn.Linear(dim, 2 * width)
        self.coarse = nn.ModuleList(Modulated(2 * width, time) for _ in range(2))
        self.rise = nn.Conv2d(2 * width, width * self.up**2, 1)
        self.join = nn.Conv2d(2 * width, width, 1)
        self.last = Modulated(width, time)
        self.leave = nn.Conv2d(width, folded, 3, padding=1)
        nn.init.zeros_(self.leave.weight)

    def forward(self, x_BHhw: Tensor, t_B: Tensor, tokens_BND: Tensor) -> Tensor:
        """Velocity (B, H, h, w) at the points `x_BHhw` and times `t_B` in [0, 1], given patch tokens (B, N, D)."""
        base_BHhw, size_B111, change_B111 = best_line(x_BHhw, t_B)
        return base_BHhw + change_B111 * self._change(x_BHhw / size_B111, t_B, tokens_BND)

    def _change(self, x_BHhw: Tensor, t_B: Tensor, tokens_BND: Tensor) -> Tensor:
        """What the network adds to the best straight line, about unit variance in and out."""
        time_BC = self.time(waves(t_B))
        grid_BDHW = tokens_BND.transpose(1, 2).reshape(len(t_B), -1, self.side, self.side)
        spread_BCHW = self._on_grid(self.spread, grid_BDHW)
        x_BCHW = self.enter(F.pixel_unshuffle(x_BHhw, FOLD)) + F.pixel_shuffle(spread_BCHW, self.up)
        fine_BCHW = self.fine(x_BCHW, time_BC)
        y_BCHW = self.down(fine_BCHW) + self._on_grid(self.know, grid_BDHW)
        for block in self.coarse:
            y_BCHW = block(y_BCHW, time_BC)
        risen_BCHW = F.pixel_shuffle(self.rise(y_BCHW), self.up)
        joined_BCHW = self.join(torch.cat((risen_BCHW, fine_BCHW), dim=1))
        out_BFHW = self.leave(F.silu(self.last(joined_BCHW, time_BC)))
        return F.pixel_shuffle(out_BFHW, FOLD)

    @staticmethod
    def _on_grid(linear: nn.Linear, grid_BDHW: Tensor) -> Tensor:
        return F.conv2d(grid_BDHW, linear.weight[..., None, None], linear.bias)


def best_line(x: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The velocity as well as a straight line can tell it from x alone, and the sizes of x and of what is left.

    On the straight path of data with mean m and variance s² to unit noise, x has the variance d = (1 - t)² + t² s²,
    the best line is m + (t s² - (1 - t)) / d (x - t m), and its error has the variance s² / d. A network that starts
    there has only the data to learn, not the noise (preconditioning as in arXiv:2206.00364, section 5).
    """
    t = t_B.float().view(-1, *(1,) * (x.ndim - 1))
    variance = (1 - t).square() + (t * STD).square()
    slope = (t * STD**2 - (1 - t)) / variance
    return MEAN + slope * (x - t * MEAN), variance.sqrt(), STD / variance.sqrt()


def waves(t_B: Tensor) -> Tensor:
    """Sines and cosines (B, WAVES) of times in [0, 1], one to a thousand radians (arXiv:2006.11239, appendix B)."""
    rate = torch.exp(torch.linspace(0, math.log(1000.0), WAVES // 2, device=t_B.device))
    angle = t_B.float()[:, None] * rate
    return torch.cat((angle.sin(), angle.cos()), dim=1)
