"""The autoregressive half of the world model: codes of a frame from the past and the frames before it.

One token stands for one square of the picture at one instant. All squares of a frame are predicted at once, from the
backbone's tokens of the past, the codes of frames already known, and (optionally) what the ego does: attention is
causal in time, block by block.

Legend: B batch, N places (tokens of the backbone), M codes of one place, K codes, D their length, W frames in the
window, E width, L tokens of the whole sequence, F numbers that describe the ego's motion.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MAX_FRAMES = 8
ACTION = 6  # numbers that describe the ego's motion to a frame: since the frame before and since the present


class Block(nn.Module):
    """A pre-norm transformer block (arXiv:1706.03762; norm first as in arXiv:2002.04745)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BLE: Tensor, hidden_LL: Tensor) -> Tensor:
        """Map (B, L, E) to the same shape; nothing is read where `hidden_LL` (reader, read) is true."""
        x_BLE = x_BLE + self.join(self._attend(self.project(self.first(x_BLE)), hidden_LL))
        y_BLE: Tensor = x_BLE + self.mlp(self.second(x_BLE))
        return y_BLE

    def _attend(self, joint: Tensor, hidden_LL: Tensor) -> Tensor:
        """Plain products: with few tokens on a CPU their backward pass is faster than the fused kernel's."""
        count, length = joint.shape[:2]
        query, key, value = joint.view(count, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        score = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        weight = score.float().masked_fill(hidden_LL, float("-inf")).softmax(-1).to(value.dtype)
        read_BLE: Tensor = (weight @ value).transpose(1, 2).flatten(2)
        return read_BLE


class NextCodes(nn.Module):
    """Logits of the codes of up to W frames in a row.

    Args:
        places: N.
        merge: M, codes at each place.
        codes: K.
        code_dim: D.
        context_dim: Width of the backbone's tokens.
        width: E.
        depth: Blocks.
        heads: Attention heads.
        actions: Whether it is told how the ego moves.
    """

    def __init__(
        self, *, places: int, merge: int, codes: int, code_dim: int, context_dim: int, width: int, depth: int,
        heads: int, actions: bool,
    ) -> None:
        super().__init__()
        self.places, self.merge, self.codes = places, merge, codes
        self.context = nn.Sequential(nn.LayerNorm(context_dim), nn.Linear(context_dim, width))
        self.known = nn.Linear(merge * code_dim, width)
        self.unknown_E = nn.Parameter(torch.zeros(width))
        self.place_NE = nn.Parameter(torch.randn(places, width) * 0.02)
        self.time = nn.Embedding(MAX_FRAMES + 1, width)
        nn.init.normal_(self.time.weight, std=0.02)
        self.action = nn.Sequential(nn.Linear(ACTION, width), nn.GELU(), nn.Linear(width, width)) if actions else None
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, merge * codes))

    def forward(
        self, state_BND: Tensor, known_BWNX: Tensor, blank_B: Tensor, first_B: Tensor, action_BWF: Tensor | None
    ) -> Tensor:
        """Logits (B, W, N, M, K) of the frames first, first + 1, ...

        Args:
            state_BND: The backbone's tokens (B, 1 + N, D) of the past.
            known_BWNX: Code vectors (B, W, N, M * D) of the frame before each of them.
            blank_B: Where the first of those is not known, as at the first frame, of which only the backbone tells.
            first_B: int64, frames from the present to the first one, from 1.
            action_BWF: The ego's motion to each frame (`ego_action`); None for a model without actions.
        """
        count, window = known_BWNX.shape[:2]
        context_BLE = self.context(state_BND)
        known_BWNE = self.known(known_BWNX)
        first_BNE = torch.where(blank_B[:, None, None], self.unknown_E.to(known_BWNE.dtype), known_BWNE[:, 0])
        frames_BWNE = torch.cat((first_BNE[:, None], known_BWNE[:, 1:]), dim=1)
        step_BW = first_B[:, None] + torch.arange(window, device=first_B.device)
        # Squares of a frame lie over the backbone's tokens: each one starts with what lies below it.
        frames_BWNE = frames_BWNE + self.place_NE + self.time(step_BW)[:, :, None] + context_BLE[:, None, 1:]
        if self.action is not None and action_BWF is not None:
            frames_BWNE = frames_BWNE + self.action(action_BWF)[:, :, None]
        here_BLE = torch.cat((context_BLE[:, :1], context_BLE[:, 1:] + self.place_NE), dim=1)
        x_BLE = torch.cat((here_BLE, frames_BWNE.flatten(1, 2)), dim=1)
        hidden_LL = self._hidden(window, x_BLE.device)
        for block in self.blocks:
            x_BLE = block(x_BLE, hidden_LL)
        logits: Tensor = self.head(x_BLE[:, 1 + self.places :])
        return logits.view(count, window, self.places, self.merge, self.codes)

    def _hidden(self, window: int, device: torch.device) -> Tensor:
        """(L, L) true where a token must not look: at later frames, and from the past at any frame."""
        blocks = torch.arange(window + 1, device=device).repeat_interleave(self.places)
        time_L = torch.cat((blocks.new_zeros(1), blocks))
        return time_L[:, None] < time_L[None, :]


def ego_action(motion_BT3: Tensor) -> Tensor:
    """What the ego does, as float32 (B, T, 6): its motion to each frame, and its pose there seen from the present.

    Args:
        motion_BT3: Metres ahead and to the left and radians since the frame before (`data.motion`), for the frames
            1, 2, ... after the present one.

    Returns:
        The same six numbers scaled to the order of one.
    """
    turned_BT = motion_BT3[..., 2].cumsum(1)
    before_BT = turned_BT - motion_BT3[..., 2]  # the heading in whose frame each step was measured
    cos, sin = before_BT.cos(), before_BT.sin()
    ahead_BT = (cos * motion_BT3[..., 0] - sin * motion_BT3[..., 1]).cumsum(1)
    left_BT = (sin * motion_BT3[..., 0] + cos * motion_BT3[..., 1]).cumsum(1)
    pose_BT3 = torch.stack((ahead_BT, left_BT, turned_BT), dim=-1)
    scale = motion_BT3.new_tensor([3.0, 0.5, 0.1, 12.0, 3.0, 0.5])
    return torch.cat((motion_BT3, pose_BT3), dim=-1) / scale
