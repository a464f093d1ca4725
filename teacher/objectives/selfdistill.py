"""Self-distillation: the student must say of a degraded view what a moving average of itself says of a whole one.

DINO (arXiv:2104.14294) over views of the frame, with the masked-token loss of iBOT (arXiv:2111.07832) over its hidden
patches, and centring or Sinkhorn-Knopp against collapse (arXiv:2304.07193); data2vec (arXiv:2202.03555) over the cells.
`crops.py` says what a view is here, `selfdistill_cells.py` what is asked of cells.

Legend: B samples of this process, G = 2 global views, L local ones, N tokens, K prototypes, D embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from numpy.random import Generator
from pydantic import Field
from torch import Tensor, nn

from fmdeploy.models import input_list
from fmdeploy.models.tokens import TokenBackbone, backbone_of
from fmdeploy.task import Arrays, Samples, Task
from fmdeploy.teacher.objectives.base import Objective
from fmdeploy.teacher.objectives.collapse import CollapseMonitor
from fmdeploy.teacher.objectives.crops import GLOBAL, STILL, WHOLE, ViewConfig, Views, draw_views
from fmdeploy.teacher.objectives.dense_targets import cell_targets, inputs_ahead
from fmdeploy.teacher.objectives.frames import FramesAhead
from fmdeploy.teacher.objectives.selfdistill_average import MovingCopy, rising
from fmdeploy.teacher.objectives.selfdistill_cells import CellHead
from fmdeploy.teacher.objectives.selfdistill_targets import Centre, PrototypeHead, Remembered, cross_entropy, sinkhorn
from fmdeploy.training.distributed import mean_over_ranks
from fmdeploy.training.loop import Losses, Tensors
from fmdeploy.training.sampler import Index

KIND = "selfdistill"
AHEAD = f"{KIND}.ahead"


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
    keep: float = Field(default=0.998, ge=0, lt=1, description="share of its old weights the average keeps; rises to 1")
    frames: float = Field(default=0.05, ge=0, description="weight of the frames' loss")
    patches: float = Field(default=0.05, ge=0, description="weight of the masked-token loss; 0 leaves it out")
    cells: float = Field(default=1.0, ge=0, description="weight of the cells' loss; 0 leaves it out")
    ahead: FramesAhead = Field(default=(0, 2, 4, 8), description=(
        "frames ahead, 0 to 8, whose cells are asked for; tasks of single pictures have 0 alone"))


class Heads(nn.Module):
    """Prototypes of frames and of tokens, and what reads cells off a token."""

    def __init__(self, backbone: TokenBackbone, ahead: int, config: SelfDistillationConfig) -> None:
        super().__init__()
        sizes = (backbone.dim, config.hidden_width, config.bottleneck)
        self.frame = PrototypeHead(*sizes, config.prototypes)
        self.token = PrototypeHead(*sizes, config.token_prototypes) if config.patches else None
        self.cell = CellHead(backbone, ahead) if config.cells else None


class SelfDistillation(Objective):
    """Parts `frame` and, unless their weights are 0, `token` and `cell`."""

    name = "selfdistill"
    Config = SelfDistillationConfig
    config: SelfDistillationConfig

    def __init__(self, task: Task, teacher: nn.Module, config: SelfDistillationConfig, *, steps: int) -> None:
        super().__init__(task, teacher, config, steps=steps)
        backbone = self._backbone(teacher)
        self.side, self.patch = backbone.side, backbone.patch
        self.ahead = config.ahead if task.frames > 1 else (0,)
        self.heads = Heads(backbone, len(self.ahead), config)
        self.target = MovingCopy(backbone)
        self.target_heads = MovingCopy(self.heads)
        self.frame_centre = Centre(config.prototypes, config.centre_keep)
        self.token_centre = Centre(config.token_prototypes, config.centre_keep)
        self.remembered = Remembered(config.prototypes, config.memory)
        self.monitor = CollapseMonitor(config)

    def _backbone(self, teacher: nn.Module) -> TokenBackbone:
        return backbone_of(teacher, where=f"objective {self.name}")

    def arrays(self, samples: Samples, index: Index, rngs: Sequence[Generator]) -> Mapping[str, Arrays]:
        """Kind `selfdistill`: see `crops.draw_views`. Kind `selfdistill.ahead`, if asked for: see `inputs_ahead`."""
        inputs = len(self.task.io.inputs)
        found: dict[str, Arrays] = {
            KIND: draw_views(self.config, rngs, num_inputs=inputs, side=self.side, patch=self.patch)}
        if self.config.cells and self.ahead != (0,):
            found[AHEAD] = inputs_ahead(self.task, samples, index, self.ahead, name=self.name)
        return found

    @property
    def unmirrored(self) -> frozenset[str]:
        """The views are drawn for the frame as it comes, mirrored or not."""
        return frozenset({KIND})

    def losses(self, teacher: nn.Module, batch: Tensors) -> Losses:
        """See `Objective.losses`."""
        backbone, drawn = self._backbone(teacher), batch[KIND]
        views = Views(input_list(self.task.io, batch["inputs"]), drawn, self.patch)
        known_BND = self.target(*views.teacher()).float()
        state_BND = backbone.tokens(*views.student()).float()
        self.monitor.see(state_BND)
        # Most of a token is where it stands, and that is all that prototypes of it would tell apart.
        mean_ND = mean_over_ranks(known_BND.mean(0))
        classes = self._classes(backbone, state_BND, views, mean_ND[0])
        found = {"frame": self._frames(known_BND[:, 0] - mean_ND[0], classes)}
        if self.heads.token is not None:
            found["token"] = self._tokens(known_BND[:, 1:] - mean_ND[1:], state_BND[:, 1:] - mean_ND[1:], drawn)
        if self.heads.cell is not None:
            found["cell"] = self._cells(batch, state_BND.chunk(GLOBAL)[STILL][:, 1:])
        weights = {"frame": self.config.frames, "token": self.config.patches, "cell": self.config.cells}
        return {part: weights[part] * value for part, value in found.items()}

    def _classes(self, backbone: TokenBackbone, state_BND: Tensor, views: Views, mean_D: Tensor) -> list[Tensor]:
        """Class tokens (B, D) of every view of the student, without their mean."""
        classes = [*state_BND[:, 0].chunk(GLOBAL)]
        if (local := views.local()) is not None:
            inputs, window_BK = local
            classes += backbone.tokens(*inputs, keep_BK=window_BK)[:, 0].float().chunk(self.config.local_views)
        return [class_BD - mean_D for class_BD in classes]

    def _cells(self, batch: Tensors, state_BND: Tensor) -> Tensor:
        """Squared error of what is told of the cells of the view that stands still, as a share of their variance."""
        average, head = self.target.module, self.heads.cell
        assert isinstance(average, TokenBackbone)
        assert head is not None
        whole = batch.get(AHEAD, batch["inputs"])
        wanted = cell_targets(self.task, average, whole, ahead=len(self.ahead))
        return F.mse_loss(head(state_BND), wanted)

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
