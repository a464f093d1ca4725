"""A tokeniser of bird's-eye frames: a VQ-VAE (arXiv:1711.00937) whose codebook follows by moving averages.

Every code stands for one square of the grid and is decoded without looking at its neighbours. So the expectation of a
picture under a distribution over codes is a product with a table, exactly; nothing needs to be sampled.

Legend: B frames, C planes, H W cells, G squares of a frame, P cells of a square, V vectors, K codes, D their length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmdeploy.errors import ConfigError
from fmdeploy.training.distributed import sum_over_ranks, world

DEAD = 0.01  # share of the mean use below which a code is dead
REBORN = 0.05  # share of the mean use that a restarted code begins with: some 80 updates to prove itself
NEAR = 1e-4  # mean square distance, of vectors of unit variance, below which a code of its own is not worth it
EPSILON = 1e-6


class Quantized(NamedTuple):
    """Vectors snapped to the codebook.

    Attributes:
        codes_BG: int64 numbers of the nearest codes.
        vectors_BGD: The codes themselves, with the gradient of what was snapped.
        commitment: Mean squared distance, whose gradient draws the encoder to the codes.
    """

    codes_BG: Tensor
    vectors_BGD: Tensor
    commitment: Tensor


class Codebook(nn.Module):
    """K vectors that follow the mean of what is assigned to them (arXiv:1711.00937, appendix A.1).

    It has no parameters. What a step assigned is summed up in `forward` and taken in by `update`, once an optimiser
    step, so parts and processes of a batch count as one. A code that is hardly used is restarted at a vector of the
    step that is badly represented: drawn with the distance as weight, as in k-means++. Never where there is a code
    already: of two codes in one place either may be nearest, and what they stand for would change hands by rounding.

    Args:
        codes: K.
        dim: D.
        decay: Weight of the past in the moving averages.
    """

    codebook_KD: Tensor
    count_K: Tensor
    sum_KD: Tensor

    def __init__(self, codes: int, dim: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("codebook_KD", torch.randn(codes, dim))
        self.register_buffer("count_K", torch.zeros(codes))
        self.register_buffer("sum_KD", torch.zeros(codes, dim))
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []  # counts, sums, candidates for a restart

    def nearest(self, z_BGD: Tensor) -> Tensor:
        """Numbers int64 (B, G) of the codes nearest to float32 vectors; the first of equally near ones."""
        book_KD = self.codebook_KD
        # |z - e|² without |z|², which is the same for all codes
        distance_BGK = book_KD.square().sum(1) - 2 * z_BGD @ book_KD.T
        return distance_BGK.argmin(-1)

    def forward(self, z_BGD: Tensor, draw_B: Tensor | None = None) -> Quantized:
        """Snap float32 vectors to the codebook.

        Args:
            z_BGD: What the encoder made.
            draw_B: In training, a number in [0, 1) a frame: which of its vectors may restart a dead code.
        """
        codes_BG = self.nearest(z_BGD)
        picked_BGD = self.codebook_KD[codes_BG]
        commitment = F.mse_loss(z_BGD, picked_BGD)
        if self.training and draw_B is not None:
            self._note(z_BGD.detach(), codes_BG, (z_BGD - picked_BGD).detach().square().sum(-1), draw_B)
        # Straight through: the value of the code, the gradient of z (arXiv:1711.00937, section 3.2).
        return Quantized(codes_BG, z_BGD + (picked_BGD - z_BGD).detach(), commitment)

    @torch.no_grad()
    def _note(self, z_BGD: Tensor, codes_BG: Tensor, error_BG: Tensor, draw_B: Tensor) -> None:
        flat_V = codes_BG.flatten()
        count_K = torch.zeros_like(self.count_K).index_add_(0, flat_V, torch.ones_like(flat_V, dtype=torch.float32))
        sum_KD = torch.zeros_like(self.sum_KD).index_add_(0, flat_V, z_BGD.flatten(0, 1))
        mass_BG = error_BG.cumsum(1)
        place_B = torch.searchsorted(mass_BG, mass_BG[:, -1:] * draw_B[:, None]).clamp_(max=error_BG.shape[1] - 1)
        chosen_BD = z_BGD.gather(1, place_B[..., None].expand(-1, 1, z_BGD.shape[-1]))[:, 0]
        self._parts.append((count_K, sum_KD, torch.cat((chosen_BD, error_BG.gather(1, place_B)), dim=1)))

    @torch.no_grad()
    def update(self, *, restart: bool) -> dict[str, Tensor]:
        """Take in what the step assigned.

        Args:
            restart: Whether dead codes may be restarted.

        Returns:
            `perplexity` of the step's codes (K where all are used alike) and how many codes were `restarted`.
        """
        parts, self._parts = self._parts, []
        count_K = sum_over_ranks(torch.stack([count_K for count_K, _, _ in parts]).sum(0))
        sum_KD = sum_over_ranks(torch.stack([sum_KD for _, sum_KD, _ in parts]).sum(0))
        self.count_K.lerp_(count_K, 1 - self.decay)
        self.sum_KD.lerp_(sum_KD, 1 - self.decay)
        used_K = self.count_K > EPSILON
        self.codebook_KD[used_K] = self.sum_KD[used_K] / self.count_K[used_K, None]
        restarted = self._restart(_of_all_ranks([chosen for _, _, chosen in parts])) if restart else 0
        return {"perplexity": perplexity(count_K), "restarted": torch.tensor(float(restarted), device=count_K.device)}

    def _restart(self, candidate_VX: Tensor) -> int:
        """Put dead codes, the least used first, to the worthy of the candidates; how many that were.

        Args:
            candidate_VX: (V, D + 1) vectors, and the squared distance of each to its code.
        """
        mean, (all_VD, error_V) = self.count_K.mean(), (candidate_VX[:, :-1], candidate_VX[:, -1])
        close_VV = (all_VD[:, None] - all_VD[None]).square().mean(-1) < NEAR
        worthy_V = (error_V > NEAR * all_VD.shape[1]) & ~close_VV.tril(-1).any(1)
        chosen_VD = all_VD[worthy_V]
        count = min(len(chosen_VD), int((self.count_K < DEAD * mean).sum()))
        dead = self.count_K.argsort(stable=True)[:count]
        self.codebook_KD[dead] = chosen_VD[:count]
        self.count_K[dead] = REBORN * mean
        self.sum_KD[dead] = REBORN * mean * chosen_VD[:count]
        return count


class FrameVAE(nn.Module):
    """Encoder, codebook and decoder of frames (B, C, H, H) of zeros and ones.

    Args:
        planes: C.
        size: H.
        grid: Squares a side; G = grid².
        codes: K.
        dim: D.
        hidden: Width of encoder and decoder.
        decay: Of the codebook's moving averages.

    Raises:
        ConfigError: `grid` does not divide `size`.
    """

    never_averaged = True  # a predictor learns the names that this very encoder gives (training/ema.py)

    def __init__(
        self, *, planes: int, size: int, grid: int, codes: int, dim: int, hidden: int = 128, decay: float = 0.98
    ) -> None:
        super().__init__()
        if size % grid:
            raise ConfigError("the codes do not tile the frame", where="grid", found=grid, expected=f"a part of {size}")
        self.planes, self.grid, self.side = planes, grid, size // grid
        cells = planes * self.side**2
        self.encoder = nn.Sequential(
            nn.Linear(cells, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, dim),
            nn.LayerNorm(dim, elementwise_affine=False))
        self.book = Codebook(codes, dim, decay)
        self.decoder = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, cells))

    def forward(self, frame_BCHW: Tensor, draw_B: Tensor | None = None) -> tuple[Quantized, Tensor]:
        """Quantised codes, and logits (B, C, H, W) of the frame decoded from them; always in float32.

        Args:
            frame_BCHW: Zeros and ones.
            draw_B: As in `Codebook.forward`.
        """
        with torch.autocast(frame_BCHW.device.type, enabled=False):  # the nearest code must not hang on rounding
            found: Quantized = self.book(self.encoder(self._squares(frame_BCHW.float())), draw_B)
            return found, self.picture(self.decoder(found.vectors_BGD))

    def codes(self, frame_BCHW: Tensor) -> Tensor:
        """Codes int64 (B, G) of frames, row by row."""
        with torch.no_grad(), torch.autocast(frame_BCHW.device.type, enabled=False):
            return self.book.nearest(self.encoder(self._squares(frame_BCHW.float())))

    def table(self) -> Tensor:
        """Probabilities (K, C, P) of the cells of each code's square, row by row."""
        with torch.no_grad(), torch.autocast(self.book.codebook_KD.device.type, enabled=False):
            logits: Tensor = self.decoder(self.book.codebook_KD)
            return torch.sigmoid(logits).view(len(logits), self.planes, -1)

    def picture(self, square_BGX: Tensor) -> Tensor:
        """Pictures (B, C, H, W) from squares (B, G, C * P), for any number C of planes."""
        count, grid, side = len(square_BGX), self.grid, self.side
        planes = square_BGX.shape[-1] // side**2
        cells = square_BGX.reshape(count, grid, grid, planes, side, side).permute(0, 3, 1, 4, 2, 5)
        return cells.reshape(count, planes, grid * side, grid * side)

    def _squares(self, frame_BCHW: Tensor) -> Tensor:
        count, grid, side = len(frame_BCHW), self.grid, self.side
        cells = frame_BCHW.reshape(count, self.planes, grid, side, grid, side).permute(0, 2, 4, 1, 3, 5)
        return cells.reshape(count, grid * grid, -1)


def perplexity(count_K: Tensor) -> Tensor:
    """exp(entropy) of the use of K codes: how many of them equal use would take; 1 where one code does it all."""
    share_K = count_K / count_K.sum().clamp_min(EPSILON)
    return torch.exp(-torch.special.xlogy(share_K, share_K).sum())


def _of_all_ranks(parts: list[Tensor]) -> Tensor:
    """Rows of all parts and processes in the order in which one process without parts has them: (V, D)."""
    mine = torch.stack(parts)  # (parts, rows, D)
    rank, size = world()
    slots = mine.new_zeros(mine.shape[0], size, *mine.shape[1:])
    slots[:, rank] = mine
    return sum_over_ranks(slots).flatten(0, 2)
