"""Self-distillation: the student must say of a degraded view what a moving average of itself says of a whole one.

DINO (arXiv:2104.14294) over views of the frame, with the masked-token loss of iBOT (arXiv:2111.07832) over its hidden
patches, and centring or Sinkhorn-Knopp against collapse (arXiv:2304.07193). `crops.py` says what a view is here.

Legend: B samples of this process, G = 2 global views, L local ones, N tokens, K prototypes, D embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from numpy.random import Generator
from pydantic import Field
from torch import Tensor, nn

from fmdeploy.models import input_list
from fmdeploy.models.tokens import TokenBackbone, backbone_of
from fmdeploy.task import Arrays, Samples, Task
from fmdeploy.teacher.objectives.base import Objective
from fmdeploy.teacher.objectives.collapse import CollapseMonitor
from fmdeploy.teacher.objectives.crops import GLOBAL, WHOLE, ViewConfig, Views, draw_views
from fmdeploy.teacher.objectives.selfdistill_average import MovingCopy, rising
from fmdeploy.teacher.objectives.selfdistill_targets import Centre, PrototypeHead, Remembered, cross_entropy, sinkhorn
from fmdeploy.training.distributed import mean_over_ranks
from fmdeploy.training.loop import Losses, Tensors
from fmdeploy.training.sampler import Index

KIND = "selfdistill"


class SelfDistillationConfig(ViewConfig):
    """Options of `selfdistill`."""

    prototypes: int = Field(default=64, ge=2, description="kinds of frames")
    token_prototypes: int = Field(default=256, ge=2, description="kinds of tokens")
    memory: int = Field(default=512, ge=1, description="views of former steps that Sinkhorn-Knopp balances frames with")
    hidden_width: int = Field(default=256, ge=2, description="width of the heads")
    bottleneck: int = Field(default=64, ge=2, description="width in which likeness to a prototype is a cosine")
    balance: Literal["sinkhorn", "centre"] = Field(default="sinkhorn", description=(
        "what keeps one prototype from taking everything"))
    centre_keep: float = Field(default=0.9, ge=0, lt=1, description="share of the old centre that stays")
    frame_temperature: float = Field(default=0.05, gt=0, le=1, description="of the targets of frames")
    token_temperature: float = Field(default=0.05, gt=0, le=1, description="of the targets of tokens")
    student_temperature: float = Field(default=0.1, gt=0, le=1, description="of the answers")
    keep: float = Field(default=0.98, ge=0, lt=1, description="share of its old weights the average keeps; rises to 1")
    patches: float = Field(default=1.0, ge=0, description="weight of the masked-token loss; 0 leaves it out")


class Heads(nn.Module):
    """Prototypes of frames and of tokens."""

    def __init__(self, dim: int, config: SelfDistillationConfig) -> None:
        super().__init__()
        sizes = (dim, config.hidden_width, config.bottleneck)
        self.frame = PrototypeHead(*sizes, config.prototypes)
        self.token = PrototypeHead(*sizes, config.token_prototypes) if config.patches else None


class SelfDistillation(Objective):
    """Parts `frame` and, unless `patches` is 0, `token`."""

    name = "selfdistill"
    Config = SelfDistillationConfig
    config: SelfDistillationConfig

    def __init__(self, task: Task, teacher: nn.Module, config: SelfDistillationConfig, *, steps: int) -> None:
        super().__init__(task, teacher, config, steps=steps)
        backbone = self._backbone(teacher)
        self.side, self.patch = backbone.side, backbone.patch
        self.heads = Heads(backbone.dim, config)
        self.target = MovingCopy(backbone)
        self.target_heads = MovingCopy(self.heads)
        self.frame_centre = Centre(config.prototypes, config.centre_keep)
        self.token_centre = Centre(config.token_prototypes, config.centre_keep)
        self.remembered = Remembered(config.prototypes, config.memory)
        self.monitor = CollapseMonitor(config)

    def _backbone(self, teacher: nn.Module) -> TokenBackbone:
        return backbone_of(teacher, where=f"objective {self.name}")

    def arrays(self, samples: Samples, index: Index, rngs: Sequence[Generator]) -> Mapping[str, Arrays]:
        """Kind `selfdistill`: see `crops.draw_views`."""
        inputs = len(self.task.io.inputs)
        return {KIND: draw_views(self.config, rngs, num_inputs=inputs, side=self.side, patch=self.patch)}

    @property
    def unmirrored(self) -> frozenset[str]:
        """The views are drawn for the frame as it comes, mirrored or not."""
        return frozenset({KIND})

    def losses(self, teacher: nn.Module, batch: Tensors) -> Losses:
        """See `Objective.losses`."""
        backbone, drawn = self._backbone(teacher), batch[KIND]
        views = Views(input_list(self.task.io, batch["inputs"]), drawn, self.patch)
        known_BND = self.target(*views.teacher())
        state_BND = backbone.tokens(*views.student())
        self.monitor.see(state_BND)
        classes = [*state_BND[:, 0].chunk(GLOBAL)]
        if (local := views.local()) is not None:
            inputs, window_BK = local
            local_BD = backbone.tokens(*inputs, keep_BK=window_BK)[:, 0]
            classes += local_BD.chunk(self.config.local_views)
        found = {"frame": self._frames(known_BND[:, 0], classes)}
        if self.heads.token is not None:
            found["token"] = self.config.patches * self._tokens(known_BND[:, 1:], state_BND[:, 1:], drawn)
        return found

    def _frames(self, known_BD: Tensor, classes: Sequence[Tensor]) -> Tensor:
        """Cross entropy of every view but the same one against each global view, mean over the pairs."""
        scores_MK = self.target_heads.module.get_submodule("frame")(known_BD)
        if self.config.balance == "sinkhorn":
            targets = self.remembered(scores_MK.chunk(GLOBAL), self.config.frame_temperature)
        else:
            targets = self.frame_centre(scores_MK, self.config.frame_temperature).chunk(GLOBAL)
        answers = [self.heads.frame(class_BD) for class_BD in classes]
        pairs = [cross_entropy(target, answer, self.config.student_temperature).mean()
                 for g, target in enumerate(targets) for v, answer in enumerate(answers) if v != g]
        return torch.stack(pairs).mean()

    def _tokens(self, known_BND: Tensor, state_BND: Tensor, drawn: Mapping[str, Tensor]) -> Tensor:
        """Cross entropy at hidden patches, and at all patches of a view that lacks a sensor, mean over them."""
        scores_BNK = self.target_heads.module.get_submodule("token")(known_BND)
        balance = sinkhorn if self.config.balance == "sinkhorn" else self.token_centre
        target_BNK = balance(scores_BNK.flatten(0, 1), self.config.token_temperature).view_as(scores_BNK)
        lacking = drawn["missing"][:, :GLOBAL, None] != WHOLE
        asked_BN = (drawn["hidden"] | lacking).transpose(0, 1).flatten(0, 1).float()
        assert self.heads.token is not None
        loss_BN = cross_entropy(target_BNK, self.heads.token(state_BND), self.config.student_temperature)
        return (loss_BN * asked_BN).sum() / (mean_over_ranks(asked_BN.sum()).clamp_min(1))

    def after_step(self, teacher: nn.Module, step: int) -> Mapping[str, Tensor]:
        """Move the average and the centres, look for collapse."""
        keep = rising(self.config.keep, 1.0, step, self.steps)
        self.target.follow(self._backbone(teacher), keep)
        self.target_heads.follow(self.heads, keep)
        self.frame_centre.follow()
        self.token_centre.follow()
        self.remembered.follow()
        return self.monitor.report(step)
