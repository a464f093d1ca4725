"""What every pre-training objective needs of a teacher: a backbone that turns sensors into tokens.

Legend: B batch, C channels, H W rows and columns of an input, h those of a map inside, N tokens of the whole picture,
K visible ones, D embedding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from fmdeploy.errors import ConfigError
from fmdeploy.models.vit import class_and_grid


class TokenBackbone(nn.Module, ABC):
    """Base class of backbones that can be pre-trained: all inputs of the task in, tokens out.

    Attributes:
        dim: D.
        side: Tokens a side; N = side².
        patch: Cells (or pixels) of the input in one token, a side; the input is `side * patch` wide.
    """

    dim: int
    side: int
    patch: int

    @abstractmethod
    def tokens(self, *inputs: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """Hidden states (B, 1 + N, D): a class token, then the picture's tokens row by row.

        Args:
            inputs: (B, C, H, W) each, in the order of the task's specification.
            keep_BK: int64 numbers of the visible tokens, 0..N-1: only they (and the class token) go through the
                transformer, and (B, 1 + K, D) in their order come back (MAE, arXiv:2111.06377, section 3). What
                stands in front of the transformer sees the inputs as they are given: blank hidden patches there.
        """

    def finest(self, *inputs: Tensor) -> Tensor:
        """The finest map (B, C, h, h) that a decoder may read besides the tokens; `finest_size` says C and h.

        Default: the tokens themselves as a map.
        """
        return class_and_grid(self.tokens(*inputs), self.side)[1]

    @property
    def finest_size(self) -> tuple[int, int]:
        """Channels of `finest`, and its cells a side, a multiple of `side`."""
        return self.dim, self.side


def backbone_of(teacher: nn.Module, *, where: object) -> TokenBackbone:
    """The backbone of a teacher, at its attribute `backbone`.

    Raises:
        ConfigError: it has none that can be pre-trained.
    """
    found = getattr(teacher, "backbone", None)
    if not isinstance(found, TokenBackbone):
        raise ConfigError(
            "this teacher has no backbone that can be pre-trained", where=where, found=type(teacher).__name__,
            expected="an attribute `backbone` that is a fmdeploy.models.tokens.TokenBackbone",
        )
    return found
