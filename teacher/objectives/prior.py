"""What stands where on average: the answer that needs no network, from which a reconstruction is judged.

Most cells of driving planes can be guessed from their place alone (road ahead, nothing far out), and planes differ by
orders of magnitude in how often they are set. A plain loss spends its first hundreds of steps on the former and hardly
notices vehicles. So predictions are deviations from a running mean of each place, and every channel's loss is a share
of what that mean leaves unexplained: 1 for a decoder that says nothing, 0 for a perfect one.

Legend: B samples, N tokens, M hidden ones, C channels, Q = P * P cells of one token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmdeploy.training.distributed import sum_over_ranks

SLOWEST = 0.01  # weight of the newest batch in the running mean, once there were a hundred
RAREST = 1e-3  # probabilities are kept this far from 0 and 1
LEAST = 1e-3  # variance or entropy of a channel, so that one that never changes does not explode


class PlacePrior(nn.Module):
    """Running mean of every cell of one input's patches, over all processes; part of the checkpoint.

    Args:
        num_tokens: N.
        channels: C.
        cells: Q.
    """

    mean_NCQ: Tensor
    variance_C: Tensor
    batches: Tensor

    def __init__(self, num_tokens: int, channels: int, cells: int) -> None:
        super().__init__()
        self.register_buffer("mean_NCQ", torch.zeros(num_tokens, channels, cells))
        self.register_buffer("variance_C", torch.zeros(channels))
        self.register_buffer("batches", torch.zeros(()))

    @torch.no_grad()
    def see(self, patches_BNCQ: Tensor) -> None:
        """Take in one share of a batch, (B, N, C, Q)."""
        count = sum_over_ranks(patches_BNCQ.new_tensor(float(len(patches_BNCQ))))
        mean_NCQ = sum_over_ranks(patches_BNCQ.sum(0)) / count
        self.batches += 1
        weight = (1 / self.batches).clamp_min(SLOWEST)
        self.mean_NCQ.lerp_(mean_NCQ, weight)
        off_C = sum_over_ranks((patches_BNCQ - self.mean_NCQ).square().mean((1, 3)).sum(0)) / count
        self.variance_C.lerp_(off_C, weight)

    def squared(self, deviation_BMCQ: Tensor, wanted_BMCQ: Tensor, places_BM: Tensor) -> Tensor:
        """Share of the variance that is not explained, mean over channels; `deviation` is in standard deviations."""
        scale_C1 = self.variance_C.clamp_min(LEAST).sqrt()[:, None]
        return F.mse_loss(deviation_BMCQ, (wanted_BMCQ - self.mean_NCQ[places_BM]) / scale_C1)

    def entropy(self, logit_BMCQ: Tensor, wanted_BMCQ: Tensor, places_BM: Tensor, positive: float) -> Tensor:
        """Binary cross entropy as a share of the prior's own, mean over channels; `logit` is added to the prior's."""
        chance_NCQ = self.mean_NCQ.clamp(RAREST, 1 - RAREST)
        weights = wanted_BMCQ.new_tensor(positive)
        loss_C = F.binary_cross_entropy_with_logits(
            logit_BMCQ + torch.logit(chance_NCQ)[places_BM], wanted_BMCQ, pos_weight=weights, reduction="none",
        ).mean((0, 1, 3))
        own_NCQ = -positive * torch.xlogy(chance_NCQ, chance_NCQ) - torch.xlogy(1 - chance_NCQ, 1 - chance_NCQ)
        return (loss_C / own_NCQ.mean((0, 2)).clamp_min(LEAST)).mean()
