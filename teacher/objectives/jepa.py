"""Prediction in feature space: from a context, the features of blocks that it does not show (I-JEPA, arXiv:2301.08243).

The target encoder is a moving average of the backbone and sees everything; the backbone sees the context alone, with
the rest of the picture blanked in front of its convolutional stem; the predictor is told where each block lies and says
what the target encoder finds there. A network that gives every input the same features would do this without a fault:
`collapse` watches for that.

Legend: B samples, N tokens, K tokens of the context, T blocks of M tokens, D embedding,
X = B * T or T * M.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from numpy.random import Generator
from pydantic import Field
from torch import Tensor, nn

from fmdeploy.models import input_list
from fmdeploy.models.tokens import TokenBackbone, backbone_of
from fmdeploy.task import Arrays, Samples, Task
from fmdeploy.teacher.objectives.base import Objective
from fmdeploy.teacher.objectives.collapse import CollapseConfig, CollapseMonitor
from fmdeploy.teacher.objectives.masking import Index, arrays_of, block_masks, context_size
from fmdeploy.teacher.objectives.predictor import Predictor, blanked, check_grid, places, rows_at
from fmdeploy.training.distributed import sum_over_ranks
from fmdeploy.training.ema import follow
from fmdeploy.training.loop import Losses, Tensors

KIND = "jepa"
ADVICE = "Start over with a slower target (--set jepa.decay=0.998) or a smaller --lr"


class JepaConfig(CollapseConfig):
    """Options of `jepa`."""

    blocks: int = Field(default=4, ge=1, description="target blocks a sample")
    share: float = Field(default=0.15, gt=0, lt=1, description="share of the tokens in one block")
    context: float = Field(default=0.4, gt=0, lt=1, description="share of the tokens the backbone sees, at most")
    decay: float = Field(default=0.99, ge=0, le=1, description="of the moving target, at first")
    final_decay: float = Field(default=1.0, ge=0, le=1, description="at the last step; it rises linearly")
    centre: bool = Field(default=True, description="take each place's mean over the batch from the targets first")
    width: int = Field(default=96, ge=4, description="width of the predictor")
    depth: int = Field(default=2, ge=1, description="its blocks")
    heads: int = Field(default=4, ge=1, description="its attention heads")


class Jepa(Objective):
    """Part `predict`: smooth L1 between predicted and layer-normed target features, mean over blocks, places and D."""

    name = "jepa"
    Config = JepaConfig
    config: JepaConfig

    def __init__(self, task: Task, teacher: nn.Module, config: JepaConfig, *, steps: int) -> None:
        super().__init__(task, teacher, config, steps=steps)
        backbone = backbone_of(teacher, where=self.name)
        self.side = backbone.side
        check_grid({spec.name: spec.shape for spec in task.io.inputs}, self.side, where=self.name)
        context_size(self.side, blocks=config.blocks, share=config.share, context=config.context)
        self.target: TokenBackbone = copy.deepcopy(backbone).requires_grad_(False)
        self.predictor = Predictor(backbone.dim, self.side, width=config.width, depth=config.depth, heads=config.heads)
        self.leave = nn.Linear(config.width, backbone.dim)
        self.monitor = CollapseMonitor(config, advice=ADVICE)

    def train(self, mode: bool = True) -> Jepa:
        """The target stays as in use: dropout and batch statistics have no place in what is to be predicted."""
        super().train(mode)
        self.target.eval()
        return self

    def arrays(self, samples: Samples, index: Index, rngs: Sequence[Generator]) -> Mapping[str, Arrays]:
        """Kind `jepa`: token numbers `context` (B, K) and `targets` (B, T, M)."""
        config = self.config
        drawn = block_masks(self.side, blocks=config.blocks, share=config.share, context=config.context, rngs=rngs)
        return {KIND: arrays_of(context=drawn.context_BK, targets=drawn.targets_BTM)}

    @property
    def unmirrored(self) -> frozenset[str]:
        """Token numbers are drawn at random anyway."""
        return frozenset({KIND})

    def losses(self, teacher: nn.Module, batch: Tensors) -> Losses:
        """See `Objective.losses`."""
        inputs, context_BK, targets_BTM = batch["inputs"], batch[KIND]["context"], batch[KIND]["targets"]
        wanted_BND = self._targets(inputs)
        blank_BN = ~places(context_BK, self.side**2)
        shown = {name: blanked(x, blank_BN) for name, x in inputs.items()}
        state_BKD = backbone_of(teacher, where=self.name).tokens(
            *input_list(self.task.io, shown), keep_BK=context_BK)
        said_BXD = self._predicted(state_BKD, context_BK, targets_BTM).float()
        return {"predict": F.smooth_l1_loss(said_BXD, rows_at(wanted_BND, targets_BTM.flatten(1)))}

    @torch.no_grad()
    def _targets(self, inputs: dict[str, Tensor]) -> Tensor:
        """Layer-normed features (B, N, D) of everything, by the moving average."""
        tokens_BND = self.target.tokens(*input_list(self.task.io, inputs))[:, 1:].float()
        self.monitor.see(tokens_BND)
        return standardised(tokens_BND) if self.config.centre else F.layer_norm(tokens_BND, tokens_BND.shape[-1:])

    def _predicted(self, state_BKD: Tensor, context_BK: Tensor, targets_BTM: Tensor) -> Tensor:
        """Predictions (B, T * M, D): every block is asked alone, so that blocks tell nothing about each other."""
        batch, blocks, _ = targets_BTM.shape
        each_XKD, each_XK = state_BKD.repeat_interleave(blocks, 0), context_BK.repeat_interleave(blocks, 0)
        filled_XNE = self.predictor(each_XKD, each_XK, targets_BTM.flatten(0, 1))
        said_BXD: Tensor = self.leave(filled_XNE[:, context_BK.shape[1] :]).reshape(batch, -1, self.leave.out_features)
        return said_BXD

    def decay_at(self, step: int) -> float:
        """Weight of the target's past at a step: linear from `decay` to `final_decay` over the run."""
        share = step / max(1, self.steps - 1)
        return self.config.decay + (self.config.final_decay - self.config.decay) * share

    @torch.no_grad()
    def after_step(self, teacher: nn.Module, step: int) -> Mapping[str, Tensor]:
        """Move the target's parameters towards the backbone's, and look whether it still tells inputs apart."""
        ours, theirs = ({**dict(module.named_parameters()), **dict(module.named_buffers())}
                        for module in (self.target, backbone_of(teacher, where=self.name)))
        follow(ours, theirs, self.decay_at(step), dict(self.target.named_parameters()))
        return self.monitor.report(step)


def standardised(tokens_BND: Tensor) -> Tensor:
    """Layer-normed features (B, N, D), of which each place's mean over the batch of all processes is taken away first.

    With conv features on a fixed grid most of a token says where it is, not what is there: a predictor that knows the
    place alone has nearly no loss, and the features shrink towards it (measured, docs/objectives.md). A single sample
    has no mean worth taking away.
    """
    count = sum_over_ranks(tokens_BND.new_tensor(float(len(tokens_BND))))
    mean_ND = sum_over_ranks(tokens_BND.sum(0)) / count
    centred_BND = tokens_BND - mean_ND * (count > 1)
    return F.layer_norm(centred_BND, tokens_BND.shape[-1:])
