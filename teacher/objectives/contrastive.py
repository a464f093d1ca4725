"""Contrast between sensors: what the camera sees of a frame and what the lidar sees of it belong together.

The backbone is given one sensor at a time, the others' channels zero, so that it must put what both see into the same
features (arXiv:1807.03748; two towers with one learned temperature: CLIP, arXiv:2103.00020). Keys come from a momentum
copy and stay in a queue, because a batch is small (MoCo, arXiv:1911.05722). Besides the whole frame, each token is
compared with the tokens of other frames at its own place (after DenseCL, arXiv:2011.09157): a pooled vector alone can
match frames by a few coarse cues, and leaves the places of things out. The frame with all its sensors is one more
query, so that the backbone also meets the input that it will be used with.

Legend: B samples of this process, M keys of all processes and the queue, S sensors, Q places of the queue, N tokens,
D embedding, P width of a projection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from pydantic import Field
from torch import Tensor, nn

from fmdeploy.errors import ConfigError
from fmdeploy.models import input_list
from fmdeploy.models.tokens import backbone_of
from fmdeploy.task import Arrays, Samples, Task
from fmdeploy.teacher.objectives.base import Objective
from fmdeploy.teacher.objectives.collapse import CollapseConfig, CollapseMonitor
from fmdeploy.teacher.objectives.contrastive_queue import KeyQueue, gather, info_nce, strangers
from fmdeploy.teacher.objectives.selfdistill_average import MovingCopy
from fmdeploy.training.distributed import world
from fmdeploy.training.loop import Losses, Tensors
from fmdeploy.training.sampler import Index

LARGEST_SCALE = 100.0  # a temperature of 0.01, where CLIP stops too
KIND = "contrastive"


class ContrastiveConfig(CollapseConfig):
    """Options of `contrastive`."""

    width: int = Field(default=64, ge=2, description="numbers in a projection of a frame")
    hidden: int = Field(default=256, ge=2, description="width of the projection heads")
    queue: int = Field(default=256, ge=0, description="frames whose keys are further negatives; 0: the batch alone")
    keep: float = Field(default=0.98, ge=0, lt=1, description="share of the old weights that the key encoder keeps")
    temperature: float = Field(default=0.1, gt=0.01, le=1, description="first value; it is learned")
    tokens: float = Field(default=1.0, ge=0, description="weight of the comparison token by token; 0 leaves it out")
    fused: bool = Field(default=True, description="let the frame with all sensors look for every sensor's key, too")
    token_width: int = Field(default=32, ge=2, description="numbers in a projection of a token")


class Projector(nn.Module):
    """A frame's pooled tokens, and each token, to unit vectors."""

    def __init__(self, dim: int, config: ContrastiveConfig) -> None:
        super().__init__()
        self.frame = _head(2 * dim, config.hidden, config.width)
        self.token = _head(dim, config.hidden, config.token_width) if config.tokens else None

    def forward(self, state_BND: Tensor) -> tuple[Tensor, Tensor | None]:
        """Unit vectors (B, P) of frames and (B, N, P) of tokens, from hidden states (B, 1 + N, D)."""
        pooled_BD = torch.cat((state_BND[:, 0], state_BND[:, 1:].mean(1)), dim=1)
        token_BNP = None if self.token is None else F.normalize(self.token(state_BND[:, 1:]).float(), dim=-1)
        return F.normalize(self.frame(pooled_BD).float(), dim=-1), token_BNP


def _head(dim: int, hidden: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, width))


class Encoder(nn.Module):
    """Backbone and projector as one module, so that one moving copy follows both."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """See `Projector.forward`."""
        found: tuple[Tensor, Tensor | None] = self.projector(self.backbone.tokens(*inputs))  # type: ignore[operator]
        return found


class Contrastive(Objective):
    """Parts `frame` and, unless `tokens` is 0, `token`.

    Raises:
        ConfigError: all inputs of the task come from one sensor.
    """

    name = "contrastive"
    Config = ContrastiveConfig
    config: ContrastiveConfig

    def __init__(self, task: Task, teacher: nn.Module, config: ContrastiveConfig, *, steps: int) -> None:
        super().__init__(task, teacher, config, steps=steps)
        self.sensors = sensors_of(task)
        backbone = backbone_of(teacher, where=f"objective {self.name}")
        self.projector = Projector(backbone.dim, config)
        self.target = MovingCopy(Encoder(backbone, self.projector))
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))
        count = len(self.sensors)
        self.queue = KeyQueue(count, config.queue, (config.width,)) if config.queue else None
        shape = (backbone.side**2, config.token_width)
        self.token_queue = KeyQueue(count, config.queue, shape) if config.queue and config.tokens else None
        self.monitor = CollapseMonitor(config)
        self._pushed: list[tuple[Tensor, Tensor | None, Tensor]] = []
        self._planned = 1  # processes of a plan, whose keys stand in for those of others

    def arrays(self, samples: Samples, index: Index, rngs: Sequence[Generator]) -> Mapping[str, Arrays]:
        """Kind `contrastive`: `group` int64 (B,), the simulation of each sample."""
        return {KIND: {"group": np.asarray(samples.groups)[index].astype(np.int64)}}

    def losses(self, teacher: nn.Module, batch: Tensors) -> Losses:
        """See `Objective.losses`."""
        alone = [self._alone(batch["inputs"], sensor) for sensor in self.sensors]
        views = [*alone, input_list(self.task.io, batch["inputs"])] if self.config.fused else alone
        backbone = backbone_of(teacher, where=f"objective {self.name}")
        states = backbone.tokens(*_stacked(views)).chunk(len(views))
        for state_BND in states:
            self.monitor.see(state_BND[:, 1:])
        queries = [self.projector(state_BND) for state_BND in states]
        frame, token = self.target(_stacked(alone))
        keys_SMP = torch.stack([self._gathered(keys_BP) for keys_BP in frame.chunk(len(alone))])
        tokens_SMNP = None if token is None else torch.stack(
            [self._gathered(keys_BNP) for keys_BNP in token.chunk(len(alone))])
        group_B = batch[KIND]["group"]
        group_M = self._gathered(group_B)
        self._note(keys_SMP, tokens_SMNP, group_M)
        return self._parts(queries, keys_SMP, tokens_SMNP, (group_B, group_M))

    def _parts(
        self, queries: list[tuple[Tensor, Tensor | None]], keys_SMP: Tensor, tokens_SMNP: Tensor | None,
        groups: tuple[Tensor, Tensor],
    ) -> Losses:
        """InfoNCE of every sensor's queries (and the whole frame's) against every other's keys, mean over the pairs."""
        scale = self.log_scale.clamp(max=math.log(LARGEST_SCALE)).exp()
        pairs = [(a, b) for a in range(len(queries)) for b in range(len(self.sensors)) if a != b]
        found: dict[str, list[Tensor]] = {"frame": [], "token": []}
        for a, b in pairs:
            keys_MP, where = _with_queue(keys_SMP[b], self.queue, b, groups)
            frame_BP, token_BNP = queries[a]
            found["frame"].append(info_nce(frame_BP, keys_MP, *where, scale))
            if token_BNP is not None and tokens_SMNP is not None:
                keys_MNP, where = _with_queue(tokens_SMNP[b], self.token_queue, b, groups)
                value = info_nce(token_BNP.transpose(0, 1), keys_MNP.transpose(0, 1), *where, scale)
                found["token"].append(self.config.tokens * value)
        return {name: torch.stack(values).mean() for name, values in found.items() if values}

    def after_step(self, teacher: nn.Module, step: int) -> Mapping[str, Tensor]:
        """Move the key encoder, put the step's keys into the queue, look for collapse."""
        backbone = backbone_of(teacher, where=f"objective {self.name}")
        self.target.follow(Encoder(backbone, self.projector), self.config.keep)
        for keys_SMP, tokens_SMNP, group_M in self._pushed:
            if self.queue is not None:
                self.queue.push(keys_SMP, group_M)
            if self.token_queue is not None and tokens_SMNP is not None:
                self.token_queue.push(tokens_SMNP, group_M)
        self._pushed = []
        return {**self.monitor.report(step), "temperature": torch.exp(-self.log_scale.detach())}

    def look_ahead(self, step: int, processes: int = 1) -> None:
        """See `Objective.look_ahead`; with more processes a query is compared with more keys."""
        self._planned = processes

    def _gathered(self, x_B: Tensor) -> Tensor:
        """Rows (M, ...) of all processes, from this one's (B, ...)."""
        return torch.cat([gather(x_B)] * self._planned)

    def _note(self, keys_SMP: Tensor, tokens_SMNP: Tensor | None, group_M: Tensor) -> None:
        if self.training:
            self._pushed.append((keys_SMP, tokens_SMNP, group_M))

    def _alone(self, inputs: Mapping[str, Tensor], sensor: str) -> list[Tensor]:
        """The inputs with every other sensor's channels zero."""
        values = input_list(self.task.io, dict(inputs))
        return [value if sensor_of(spec.name, spec.sensor) == sensor else torch.zeros_like(value)
                for spec, value in zip(self.task.io.inputs, values, strict=True)]


def sensors_of(task: Task) -> tuple[str, ...]:
    """The sensors of the task's inputs, in order; an input without one is its own.

    Raises:
        ConfigError: there is only one.
    """
    found = tuple(dict.fromkeys(sensor_of(spec.name, spec.sensor) for spec in task.io.inputs))
    if len(found) < 2:
        raise ConfigError("contrasts one sensor with another, and this task has only one",
                          where="objective contrastive", found=", ".join(found), expected="inputs of two sensors",
                          fix="Use --objective selfdistill, which needs one input only")
    return found


def sensor_of(name: str, sensor: str | None) -> str:
    """The sensor that feeds an input."""
    return sensor or name


def _stacked(views: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Each input of all views as one batch (views * B, ...)."""
    return [torch.cat(parts) for parts in zip(*views, strict=True)]


def _with_queue(
    keys_MP: Tensor, queue: KeyQueue | None, sensor: int, groups: tuple[Tensor, Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """This step's keys and the queue's; which key is each query's own, and which may be its negatives."""
    group_B, group_M = groups
    positive_B = world()[0] * len(group_B) + torch.arange(len(group_B), device=group_B.device)
    if queue is not None:
        keys_MP = torch.cat((keys_MP, queue.keys_SQP[sensor].clone()))
        group_M = torch.cat((group_M, queue.group_Q))
    return keys_MP, (positive_B, strangers(group_B, group_M))
