"""The one place that talks to `transformers`: DINOv2 encoders and folders in the Hugging Face format.

Legend: B batch, C channels, H W rows and columns of the map, N tokens, D embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fmdeploy.errors import ConfigError
from fmdeploy.models.recompute import run
from fmdeploy.optional import require

SPREAD = 0.02  # of first weights, as DINOv2 has it for wide networks


def dinov2_encoder(
    num_channels: int, image: int, patch: int, dim: int, depth: int, heads: int, spread: float = SPREAD
) -> nn.Module:
    """A DINOv2 encoder (arXiv:2304.07193) with random weights.

    Its `forward(pixel_values=...)` returns an object whose `last_hidden_state` is (B, 1 + N, D): one class token,
    then N = (image / patch)² tokens row by row.

    Raises:
        ConfigError: `heads` does not divide `dim`, or `patch` does not divide `image`.
    """
    if dim % heads or image % patch:
        raise ConfigError(f"dim {dim} must be a multiple of heads {heads}, and image {image} of patch {patch}")
    transformers = require("transformers")
    # With few tokens on a CPU the fused kernel's backward pass is slow: plain products train a fifth faster (measured).
    attention = "sdpa" if torch.cuda.is_available() else "eager"
    config = transformers.Dinov2Config(
        num_channels=num_channels, image_size=image, patch_size=patch, hidden_size=dim, num_hidden_layers=depth,
        num_attention_heads=heads, use_mask_token=False, attn_implementation=attention, initializer_range=spread,
    )
    encoder: nn.Module = transformers.Dinov2Model(config)
    # The mask token belongs to self-supervised pre-training. DistributedDataParallel stops when a parameter that
    # wants a gradient gets none.
    if (mask := getattr(encoder.get_submodule("embeddings"), "mask_token", None)) is not None:
        mask.requires_grad_(False)
    return encoder


class Dinov2Tokens(nn.Module):
    """A DINOv2 encoder that returns its last hidden state as a plain tensor.

    Args:
        spread: Standard deviation of the first weights.
        activation_checkpointing: Keep the input of each block alone for the backward pass, and run it again there.
            Block by block: all of them at once would hold everything again as soon as the backward pass begins.
    """

    def __init__(
        self, num_channels: int, image: int, patch: int, dim: int, depth: int, heads: int, *, spread: float = SPREAD,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.dinov2 = dinov2_encoder(num_channels, image, patch, dim, depth, heads, spread)
        self.activation_checkpointing = activation_checkpointing

    def forward(self, x_BCHW: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """Hidden states (B, 1 + N, D) of a map (B, C, image, image); of the tokens `keep_BK` alone where given."""
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        if keep_BK is None and not recompute:
            last_BND: Tensor = self.dinov2(pixel_values=x_BCHW).last_hidden_state
            return last_BND
        part = self.dinov2.get_submodule
        state_BND: Tensor = part("embeddings")(x_BCHW)
        if keep_BK is not None:
            index_BKD = keep_BK[..., None].expand(-1, -1, state_BND.shape[-1])
            state_BND = torch.cat((state_BND[:, :1], state_BND[:, 1:].gather(1, index_BKD)), dim=1)
        if recompute:
            for block in part("encoder.layer").children():
                state_BND = run(block, state_BND, recompute=True)
        else:
            state_BND = part("encoder")(state_BND).last_hidden_state
        normed_BND: Tensor = part("layernorm")(state_BND)
        return normed_BND


def class_and_grid(state_BND: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Split hidden states (B, 1 + side², D) into the class token (B, D) and a map (B, D, side, side)."""
    grid_BDN = state_BND[:, 1:].transpose(1, 2)
    return state_BND[:, 0], grid_BDN.reshape(*grid_BDN.shape[:2], side, side)
