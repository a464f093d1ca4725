"""A small transformer that says what stands at places nobody showed it; and patches of maps.

Legend: B batch, C channels, H W rows and columns of an input, N tokens of the whole grid, S tokens a side, P cells of
one token a side, K visible tokens, M asked ones, D embedding of the backbone, E of the predictor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fmdeploy.errors import ConfigError

BASE = 10000.0  # of the wave lengths of the position code


class Predictor(nn.Module):
    """Visible tokens and places in, a hidden state for each of both out.

    Every asked place gets the same learned mask token plus its position, and attends to all that is visible: the
    decoder of MAE (arXiv:2111.06377, section 3) and the predictor of I-JEPA (arXiv:2301.08243, section 3).

    Args:
        dim: D.
        side: S.
        width: E, a multiple of 4 and of `heads`.
        depth: Blocks.
        heads: Attention heads.
    """

    def __init__(self, dim: int, side: int, *, width: int, depth: int, heads: int) -> None:
        super().__init__()
        if width % heads or width % 4:
            raise ConfigError("the predictor's width does not fit", expected=f"a multiple of 4 and of {heads} heads",
                              found=width)
        self.enter = nn.Linear(dim, width)
        self.mask_E = nn.Parameter(torch.zeros(width).normal_(std=0.02))
        self.register_buffer("position_NE", sine_positions(side, width), persistent=False)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)

    position_NE: Tensor

    def forward(self, state_BKD: Tensor, seen_BK: Tensor, asked_BM: Tensor) -> Tensor:
        """Hidden states (B, K + M, E): of the visible places, then of the asked ones.

        Args:
            state_BKD: What the backbone returned: a class token, then the K visible tokens (B, 1 + K, D).
            seen_BK: Their places.
            asked_BM: Places to fill in.
        """
        visible_BKE = self.enter(state_BKD)
        seen_BKE = visible_BKE[:, 1:] + self.position_NE[seen_BK]
        asked_BME = self.mask_E + self.position_NE[asked_BM]
        sequence = torch.cat((visible_BKE[:, :1], seen_BKE, asked_BME.to(seen_BKE.dtype)), dim=1)
        filled: Tensor = self.blocks(sequence)
        return filled[:, 1:]


def sine_positions(side: int, width: int) -> Tensor:
    """Positions (S², E) of a grid, row by row: sines and cosines of row and column (arXiv:2104.02057, section 3)."""
    frequency = BASE ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    waves = [axis.reshape(-1, 1) * frequency for axis in (row, column)]
    return torch.cat([function(wave) for wave in waves for function in (torch.sin, torch.cos)], dim=1).float()


def patches_of(x_BCHW: Tensor, side: int) -> Tensor:
    """The map cut into tokens: (B, N, C * P * P), tokens row by row."""
    batch, channels, height, width = x_BCHW.shape
    cut = x_BCHW.reshape(batch, channels, side, height // side, side, width // side)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, side * side, -1)


def blanked(x_BCHW: Tensor, hidden_BN: Tensor) -> Tensor:
    """The map with zeros in the patches of the tokens where `hidden_BN` is true.

    Done before the convolutional stem: a convolution would carry what is hidden into its neighbours (ConvMAE,
    arXiv:2205.03892, section 3.2).
    """
    side = round(hidden_BN.shape[1] ** 0.5)
    grid = hidden_BN.reshape(-1, 1, side, side).to(x_BCHW.dtype)
    cells = grid.repeat_interleave(x_BCHW.shape[2] // side, 2).repeat_interleave(x_BCHW.shape[3] // side, 3)
    return x_BCHW * (1 - cells)


def places(index_BM: Tensor, num_tokens: int) -> Tensor:
    """Booleans (B, N): true at the places `index_BM`."""
    found = torch.zeros(len(index_BM), num_tokens, dtype=torch.bool, device=index_BM.device)
    return found.scatter(1, index_BM, True)


def rows_at(x_BND: Tensor, index_BM: Tensor) -> Tensor:
    """The rows (B, M, D) of (B, N, D) at `index_BM`."""
    return x_BND.gather(1, index_BM[..., None].expand(-1, -1, x_BND.shape[-1]))


def check_grid(shapes: dict[str, tuple[int, ...]], side: int, *, where: str) -> None:
    """Refuse inputs that are not maps on the backbone's grid.

    Raises:
        ConfigError: an input is not (C, H, W), or the tokens' grid does not divide it.
    """
    for name, shape in shapes.items():
        if len(shape) != 3 or shape[1] % side or shape[2] % side:
            raise ConfigError(f"input {name!r} is no map on the backbone's grid", where=where, found=shape,
                              expected=f"(C, H, W) with H and W multiples of {side}")
