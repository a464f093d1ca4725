"""Prediction in feature space: of what is half hidden now, the features of what is there and of what comes next.

I-JEPA (arXiv:2301.08243) for several sensors over time. The target encoder is a moving average of the backbone and sees
everything, now and some frames ahead, as V-JEPA's targets are of whole clips (arXiv:2404.08471). The backbone sees the
present without some blocks, each hidden from one sensor or from all, blanked in front of its convolutional stem. A
predictor says of every place what the target encoder finds there, in the finest map that a decoder reads: a network
that gives every input the same features would do this without a fault where targets follow, and `collapse` watches for
that.

Hidden patches stay in the sequence as blank ones (as in arXiv:2202.03555), so that the tokens are trained the way they
are used; and asking what is to come asks something of the visible places, too.

Legend: B samples, N tokens, T blocks of M tokens, A frames ahead, C channels and Q cells of a token in the finest map,
F = C * Q, D embedding, X = B * A.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
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
from fmdeploy.teacher.objectives.dense_targets import cell_targets, inputs_ahead
from fmdeploy.teacher.objectives.frames import FramesAhead
from fmdeploy.teacher.objectives.masking import Index, arrays_of, random_blocks
from fmdeploy.teacher.objectives.predictor import Predictor, blanked, check_grid, places
from fmdeploy.training.ema import follow
from fmdeploy.training.loop import Losses, Tensors

KIND = "jepa"
AHEAD = f"{KIND}.ahead"
ADVICE = "Start over with a slower target (--set jepa.decay=0.999) or a smaller --lr"


class JepaConfig(CollapseConfig):
    """Options of `jepa`."""

    blocks: int = Field(default=2, ge=1, description="hidden blocks a sample")
    share: float = Field(default=0.15, gt=0, lt=1, description="share of the tokens in one block")
    ahead: FramesAhead = Field(default=(0, 2, 4, 8), description=(
        "frames ahead, 0 to 8, of which the features are predicted; tasks of single pictures have 0 alone"))
    decay: float = Field(default=0.998, ge=0, le=1, description="of the moving target, at first")
    final_decay: float = Field(default=1.0, ge=0, le=1, description="at the last step; it rises linearly")
    width: int = Field(default=96, ge=4, description="width of the predictor")
    depth: int = Field(default=2, ge=1, description="its blocks")
    heads: int = Field(default=4, ge=1, description="its attention heads")


class Jepa(Objective):
    """Part `predict`: squared error of the predicted features, as a share of their variance; 1 says nothing."""

    name = "jepa"
    Config = JepaConfig
    config: JepaConfig

    def __init__(self, task: Task, teacher: nn.Module, config: JepaConfig, *, steps: int) -> None:
        super().__init__(task, teacher, config, steps=steps)
        backbone = backbone_of(teacher, where=self.name)
        self.side, self.ahead = backbone.side, config.ahead if task.frames > 1 else (0,)
        check_grid({spec.name: spec.shape for spec in task.io.inputs}, self.side, where=self.name)
        self.target: TokenBackbone = copy.deepcopy(backbone).requires_grad_(False)
        self.predictor = Predictor(backbone.dim, self.side, width=config.width, depth=config.depth, heads=config.heads)
        self.channels, cells = backbone.finest_size
        values = len(self.ahead) * self.channels * (cells // self.side) ** 2
        self.leave = nn.Linear(config.width, values)
        self.direct = nn.Linear(backbone.dim, values)  # what one layer can read off a token, it learns to hold sooner
        for part in (*self.leave.parameters(), *self.direct.parameters()):
            nn.init.zeros_(part)  # random first answers are unlearned by way of the tokens: feature_std fell to 0.02
        self.monitor = CollapseMonitor(config, advice=ADVICE)

    def train(self, mode: bool = True) -> Jepa:
        """The target stays as in use: dropout and batch statistics have no place in what is to be predicted."""
        super().train(mode)
        self.target.eval()
        return self

    def arrays(self, samples: Samples, index: Index, rngs: Sequence[Generator]) -> Mapping[str, Arrays]:
        """What is hidden, and the inputs to come.

        Returns:
            Kind `jepa`: token numbers `blocks` int64 (B, T, M), and `hidden` int64 (B, T): the number of the input
            that each is hidden from, or the number of inputs where it is all.
            Kind `jepa.ahead`, unless only the present is asked for: see `inputs_ahead`.
        """
        config, count = self.config, len(self.task.io.inputs)
        blocks_BTM = random_blocks(self.side, blocks=config.blocks, share=config.share, rngs=rngs)
        hidden_BT = np.stack([rng.integers(count + 1 if count > 1 else 1, size=config.blocks) for rng in rngs])
        found = {KIND: arrays_of(blocks=blocks_BTM, hidden=hidden_BT.astype(np.int64))}
        if self.ahead != (0,):
            found[AHEAD] = inputs_ahead(self.task, samples, index, self.ahead, name=self.name)
        return found

    @property
    def unmirrored(self) -> frozenset[str]:
        """Token numbers are drawn at random anyway."""
        return frozenset({KIND})

    def losses(self, teacher: nn.Module, batch: Tensors) -> Losses:
        """See `Objective.losses`."""
        shown = {spec.name: blanked(batch["inputs"][spec.name], self._hidden(batch[KIND], number))
                 for number, spec in enumerate(self.task.io.inputs)}
        state_BND = backbone_of(teacher, where=self.name).tokens(*input_list(self.task.io, shown))
        self.monitor.see(state_BND[:, 1:].float())
        return {"predict": F.mse_loss(self._predicted(state_BND), self._targets(batch))}

    def _hidden(self, drawn: Mapping[str, Tensor], number: int) -> Tensor:
        """Places (B, N) where input `number` is blanked."""
        hidden_BT, blocks_BTM = drawn["hidden"], drawn["blocks"]
        mine_BT = (hidden_BT == number) | (hidden_BT == len(self.task.io.inputs))
        in_BTN = places(blocks_BTM.flatten(0, 1), self.side**2).reshape(*mine_BT.shape, -1)
        hidden_BN: Tensor = (in_BTN & mine_BT[..., None]).any(dim=1)
        return hidden_BN

    def _predicted(self, state_BND: Tensor) -> Tensor:
        """Predictions (B, A, N, C, Q) from hidden states (B, 1 + N, D)."""
        all_BN = torch.arange(self.side**2, device=state_BND.device).expand(len(state_BND), -1)
        told: Tensor = self.leave(self.predictor(state_BND, all_BN, all_BN[:, :0])) + self.direct(state_BND[:, 1:])
        return told.float().reshape(*all_BN.shape, len(self.ahead), self.channels, -1).transpose(1, 2)

    def _targets(self, batch: Tensors) -> Tensor:
        """See `cell_targets`."""
        return cell_targets(self.task, self.target, batch.get(AHEAD, batch["inputs"]), ahead=len(self.ahead))

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
