"""InfoNCE with momentum keys, and the queue that gives it negatives when batches are small.

Legend: B queries of this process, M keys, S sensors, Q places of the queue, N tokens, P width of a projection.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fmdeploy.training.distributed import world

EMPTY = -1  # group of a place in the queue that holds nothing yet


def info_nce(query_BP: Tensor, keys_MP: Tensor, positive_B: Tensor, allowed_BM: Tensor, scale: Tensor) -> Tensor:
    """Cross entropy of finding each query's own key among all allowed ones (arXiv:1807.03748, equation 4).

        - log( exp(s q·k⁺) / (exp(s q·k⁺) + Σ over allowed k of exp(s q·k)) ), mean over queries

    Args:
        query_BP: Unit vectors; any axes (..., B, P) in front, such as one per token.
        keys_MP: Unit vectors (..., M, P).
        positive_B: int64 number of each query's key.
        allowed_BM: bool; false for keys that are no negatives of a query. The positive one is always used.
        scale: s, one over the temperature.
    """
    with torch.autocast(query_BP.device.type, enabled=False):  # in bf16 a scale of 20 leaves two digits
        logits_BM = scale * (query_BP.float() @ keys_MP.float().transpose(-1, -2))
    mine_BM = F.one_hot(positive_B, keys_MP.shape[-2]).bool()
    logits_BM = logits_BM.masked_fill(~(allowed_BM | mine_BM), -torch.inf)
    return -logits_BM.log_softmax(-1)[..., mine_BM].mean()


def strangers(group_B: Tensor, groups_M: Tensor) -> Tensor:
    """Which keys may be negatives, bool (B, M): those of another simulation; never an empty place of the queue.

    Neighbouring frames of one simulation show nearly the same scene: to push them apart would teach the wrong thing.
    """
    return (group_B[:, None] != groups_M[None]) & (groups_M != EMPTY)[None]


def gather(x_B: Tensor) -> Tensor:
    """Rows of all processes in the order of their ranks, without gradient."""
    size = world()[1]
    x_B = x_B.detach().contiguous()
    if size == 1:
        return x_B
    parts = [torch.empty_like(x_B) for _ in range(size)]
    dist.all_gather(parts, x_B)
    return torch.cat(parts)


class KeyQueue(nn.Module):
    """The newest Q keys of every sensor, first in, first out (arXiv:1911.05722, section 3.2). All of it is buffers.

    Args:
        sensors: S.
        size: Q.
        shape: Of one key: (P,), or (N, P) for a key a token.
    """

    keys_SQP: Tensor
    group_Q: Tensor
    head: Tensor

    def __init__(self, sensors: int, size: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("keys_SQP", torch.zeros(sensors, size, *shape))
        self.register_buffer("group_Q", torch.full((size,), EMPTY, dtype=torch.int64))
        self.register_buffer("head", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, keys_SBP: Tensor, group_B: Tensor) -> None:
        """Put the keys of a whole step in place of the oldest ones; of more than Q only the last stay."""
        size = len(self.group_Q)
        places = (int(self.head) + torch.arange(len(group_B), device=group_B.device))[-size:] % size
        self.keys_SQP[:, places] = keys_SBP[:, -size:].to(self.keys_SQP.dtype)
        self.group_Q[places] = group_B[-size:]
        self.head.fill_((int(self.head) + len(group_B)) % size)
