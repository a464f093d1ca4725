"""The cell loss of self-distillation: of a degraded view, the features that the average finds in the whole one.

A token stands for many cells, and what tells frames or tokens apart needs little of where things are in them. So each
token is also asked for the finest map of the moving average over its own cells, now and some frames ahead, as data2vec
regresses the average's features (arXiv:2202.03555, section 3.3). They are asked for everywhere, hidden or not, and are
standardised as those of `jepa`.

Legend: B samples, A frames ahead, N tokens, C channels and Q cells of a token in the finest map, D embedding.
"""

from __future__ import annotations

from torch import Tensor, nn

from fmdeploy.models.tokens import TokenBackbone


class CellHead(nn.Module):
    """One layer from a token to its cells' features: what it cannot read off the token is not held there.

    Args:
        backbone: Its sizes.
        ahead: A.
    """

    def __init__(self, backbone: TokenBackbone, ahead: int) -> None:
        super().__init__()
        self.ahead, (self.channels, cells) = ahead, backbone.finest_size
        self.read = nn.Linear(backbone.dim, ahead * self.channels * (cells // backbone.side) ** 2)
        for part in self.read.parameters():
            nn.init.zeros_(part)  # random first answers are unlearned by way of the tokens: feature_std fell to 0.01

    def forward(self, state_BND: Tensor) -> Tensor:
        """Float predictions (B, A, N, C, Q) from the patches' tokens."""
        told: Tensor = self.read(state_BND).float()
        return told.reshape(*told.shape[:2], self.ahead, self.channels, -1).transpose(1, 2)
