"""Whether a representation still tells inputs apart: its spread and its effective rank, watched during training.

Objectives that compare features with features (JEPA, self-distillation, contrastive) have a trivial solution: the same
features for every input. Their loss is then excellent. Two numbers give it away:

    feature_std      standard deviation over inputs, as a share of the features' root mean square; 0: one answer to all
    effective_rank   how many directions the features use: the exponential of the entropy of their singular values
                     (Roy and Vetterli, The effective rank, EUSIPCO 2007, equations 1 to 4); 1 for a single line

Both go over inputs, not over places: the mean of each token's place is taken away first, because position embeddings
alone would make the tokens of a collapsed network look different from each other.

Legend: B samples of one process's share, N tokens (places), D embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from fmdeploy.teacher.objectives.base import CollapsedError, ObjectiveConfig
from fmdeploy.training.checkpoint import PATTERN
from fmdeploy.training.distributed import sum_over_ranks

ADVICE = "Start over with a smaller --lr"
FEWEST = 4  # independent rows below which a rank says nothing


class CollapseConfig(ObjectiveConfig):
    """Options of every objective that watches for collapse."""

    watch_every: int = Field(default=10, ge=1, description="steps between two looks at the features")
    min_std: float = Field(default=0.02, ge=0, lt=1, description="feature_std below which they count as collapsed")
    min_rank: float = Field(default=1.5, ge=0, description="effective_rank below which they count as collapsed")
    min_share: float = Field(default=0.05, ge=0, lt=1, description=(
        "share of the first effective_rank below which they count as collapsed"))
    patience: int = Field(default=3, ge=1, description="collapsed looks in a row after which the run stops")


class CollapseMonitor(nn.Module):
    """Collects features during `losses`; `report` measures them now and then and stops a run that has collapsed.

    What it remembers are buffers, so that a run that was killed goes on as if it had not been. A look uses the features
    of one step only, of all processes and parts, so that every process decides alike.

    Args:
        config: How often to look, and what counts as collapsed.
        advice: What the user should change, for the message.
    """

    last_2: Tensor
    first: Tensor
    strikes: Tensor
    healthy: Tensor

    def __init__(self, config: CollapseConfig | None = None, *, advice: str = ADVICE) -> None:
        super().__init__()
        self.config, self.advice = config or CollapseConfig(), advice
        self.register_buffer("last_2", torch.full((2,), math.nan, dtype=torch.float64))
        self.register_buffer("first", torch.full((), math.nan, dtype=torch.float64))  # effective_rank at the first look
        self.register_buffer("strikes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("healthy", torch.zeros((), dtype=torch.int64))  # steps done at the last good look
        self._seen: list[Tensor] = []

    def see(self, features: Tensor) -> None:
        """Note the features (B, D) or (B, N, D) of this share; several calls a step add up, also of other N."""
        if self.training:
            self._seen.append(features.detach())

    def report(self, step: int) -> Mapping[str, Tensor]:
        """The newest `feature_std` and `effective_rank`; call it once a step, in `Objective.after_step`.

        Args:
            step: 0 for the first. The first step and every `watch_every`-th one are measured.

        Raises:
            CollapsedError: `patience` measurements in a row were below a limit.
        """
        seen, self._seen = self._seen, []
        if seen and (step == 0 or (step + 1) % self.config.watch_every == 0):
            self.last_2.copy_(torch.stack(spread(seen)))
            self.first.copy_(torch.where(self.first.isnan(), self.last_2[1], self.first))
            self._judge(step)
        return self._newest()

    def _newest(self) -> dict[str, Tensor]:
        return {"feature_std": self.last_2[0].clone(), "effective_rank": self.last_2[1].clone()}

    def _judge(self, step: int) -> None:
        std, rank = self.last_2.tolist()
        # NaN is divergence, which the loop sees, or a first look that found too few samples.
        least = max(self.config.min_rank, float(self.first.nan_to_num(0)) * self.config.min_share)
        collapsed = std < self.config.min_std or rank < least
        self.strikes.copy_(self.strikes + 1 if collapsed else torch.zeros_like(self.strikes))
        if not collapsed:
            self.healthy.fill_(step + 1)
        if int(self.strikes) >= self.config.patience:
            error = CollapsedError(
                f"the representation has collapsed at step {step}: inputs get nearly the same features",
                expected=f"feature_std >= {self.config.min_std:g} and effective_rank >= {least:.3g}",
                found=f"{std:.4f} and {rank:.2f}, {int(self.strikes)} looks in a row", fix=self.advice,
                seen=self._newest(),
            )
            error.healthy_steps = int(self.healthy)
            raise error


@torch.no_grad()
def spread(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """`feature_std` and `effective_rank`, float64 scalars, of features (B, D) or (B, N, D) of all processes.

    Parts with equal N are pooled. The mean over samples of each of the N places is taken away; what is left of all
    places is one matrix X of rows of D numbers, whose singular values are the roots of the eigenvalues of XᵀX.
    NaN where there are too few samples, or where a feature is not finite (which the training loop reports itself).
    """
    groups: dict[int, list[Tensor]] = {}
    for part in parts:
        x_BND = part[:, None] if part.ndim == 2 else part
        groups.setdefault(x_BND.shape[1], []).append(x_BND.double())
    within_DD, power, freedom, size = torch.zeros(()), torch.zeros(()), 0.0, 0
    for _, found in sorted(groups.items()):
        x_BND = torch.cat(found)
        size = x_BND.shape[-1]
        count = sum_over_ranks(x_BND.new_tensor(float(len(x_BND))))
        mean_ND = sum_over_ranks(x_BND.sum(0)) / count
        rows_KD = (x_BND - mean_ND).flatten(0, 1)
        within_DD = within_DD.to(x_BND) + sum_over_ranks(rows_KD.T @ rows_KD)
        power = power.to(x_BND) + sum_over_ranks(x_BND.square().sum())
        freedom += (float(count) - 1) * x_BND.shape[1]
    if freedom < FEWEST or not bool(torch.isfinite(within_DD).all()):
        return power.new_tensor(math.nan), power.new_tensor(math.nan)
    std = (within_DD.trace() / power.clamp_min(torch.finfo(power.dtype).tiny)).sqrt()
    return std, effective_rank(torch.linalg.eigvalsh(within_DD).clamp_min(0).sqrt(), floor=power.sqrt() * 1e-6 / size)


def effective_rank(singular_D: Tensor, *, floor: Tensor | float = 0.0) -> Tensor:
    """exp(H(p)) of p = singular values over their sum (Roy and Vetterli 2007); 0 where none is above `floor`."""
    kept_D = torch.where(singular_D > floor, singular_D, torch.zeros_like(singular_D))
    if not bool(kept_D.sum() > 0):
        return torch.zeros_like(kept_D.sum())
    share_D = kept_D / kept_D.sum()
    return torch.exp(-torch.xlogy(share_D, share_D).sum())


@contextmanager
def naming_checkpoint(folder: Path) -> Iterator[None]:
    """Let a `CollapsedError` that passes say which checkpoint in `folder` was written while all was well."""
    try:
        yield
    except CollapsedError as error:
        good = [path.name for path in sorted(folder.glob(PATTERN)) if int(path.stem[-8:]) <= error.healthy_steps]
        kept = f"The last good checkpoint is {good[-1]}" if good else "No checkpoint from before that is left"
        named = CollapsedError(error.what, where=folder.name, expected=error.expected, found=error.found,
                               fix=f"{kept}. {error.fix}")
        named.healthy_steps = error.healthy_steps
        raise named from error
