"""Conditional flow matching for future occupancy (arXiv:2210.02747): what the sensors will see, as a distribution.

A velocity field, given the backbone's tokens, learns to carry noise to the *observed* occupancy of later frames (lidar
hits and vehicles of the camera): the recording itself is the label. Afterwards it draws futures: `predict_future`
averages several into probabilities, since one average picture of what may happen is no future at all.

Legend: B samples, R draws of noise for each, H horizons, h w rows and columns of the grid of futures, N tokens,
D embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from pydantic import Field
from torch import Tensor, nn

from fmdeploy.errors import ConfigError
from fmdeploy.models import input_list
from fmdeploy.models.tokens import backbone_of
from fmdeploy.task import Array, Arrays, Samples, Task
from fmdeploy.teacher.objectives.base import Objective, ObjectiveConfig
from fmdeploy.teacher.objectives.flow_field import FOLD, VelocityField, best_line
from fmdeploy.teacher.objectives.flow_path import Method, noise_like, on_path, walk
from fmdeploy.teacher.objectives.frames import FramesAhead, Recorded
from fmdeploy.training.device import evaluation_mode
from fmdeploy.training.loop import Losses, Tensors
from fmdeploy.training.sampler import Index

KIND = "flow"
HIT, VEHICLE = 0, 2  # planes of `frames` that show other road users: lidar_hit, camera_vehicle


class FlowConfig(ObjectiveConfig):
    """Options of `flow`."""

    horizons: FramesAhead = Field(default=(0, 2, 4, 8), description="frames ahead, 0 to 8")
    reduce: int = Field(default=2, ge=1, description="cells a side that become one, by their maximum")
    width: int = Field(default=48, ge=8, multiple_of=8, description="channels of the velocity field")
    draws: int = Field(default=2, ge=1, description="noises and times for each sample of a step")
    sigma: float = Field(default=1e-3, ge=0, lt=1, description="spread left around the data at the end of a path")
    steps: int = Field(default=6, ge=1, description="steps of the solver when futures are drawn")
    method: Method = Field(default="heun", description="euler or heun")


class Flow(Objective):
    """Part `velocity`: squared error of the velocity field, as a share of what a straight line leaves; 1 at the start.

    Raises:
        ConfigError: the grid of futures does not divide into the backbone's tokens.
    """

    name = "flow"
    kept = True
    Config = FlowConfig
    config: FlowConfig

    def __init__(self, task: Task, teacher: nn.Module, config: FlowConfig, *, steps: int) -> None:
        super().__init__(task, teacher, config, steps=steps)
        backbone = backbone_of(teacher, where=f"objective {self.name}")
        whole = backbone.side * backbone.patch
        self.cells = whole // config.reduce
        if whole % config.reduce or self.cells % (backbone.side * FOLD):
            raise ConfigError("the grid of futures does not divide into the backbone's tokens", where="flow.reduce",
                              found=config.reduce, expected=f"a divisor of {backbone.patch // FOLD}")
        self.field = VelocityField(len(config.horizons), backbone.dim, backbone.side, self.cells, config.width)

    def arrays(self, samples: Samples, index: Index, rngs: Sequence[Generator]) -> Mapping[str, Arrays]:
        """Kind `flow`: `future` uint8 (B, H, h, w), `noise` float32 (B, R H, h, w) and `time` float32 (B, R).

        Raises:
            ConfigError: the samples are single pictures, without later frames.
        """
        shape = (self.config.draws * len(self.config.horizons), self.cells, self.cells)
        # One time in each of R equal parts of [0, 1]: less noise in the loss than independent ones, and as unbiased.
        parts = np.arange(self.config.draws)
        time_BR = np.stack([(parts + rng.random(len(parts))) / len(parts) for rng in rngs]).astype(np.float32)
        noise = np.stack([rng.standard_normal(shape, np.float32) for rng in rngs])
        return {KIND: {"future": self.observed(samples, index), "noise": noise, "time": time_BR}}

    def observed(self, samples: Samples, index: Index) -> Array:
        """What the sensors see at the horizons, uint8 (B, H, h, w): a lidar hit or a vehicle of the camera in a cell.

        Raises:
            ConfigError: the samples are single pictures, without later frames.
        """
        if not isinstance(samples, Recorded):
            raise ConfigError("needs the frames after each sample, and this task has none", where="objective flow",
                              found=self.task.name, expected="samples with `frames`, as those of bev-occupancy")
        planes = samples.frames(index, self.config.horizons)
        return reduced(planes[:, :, HIT] | planes[:, :, VEHICLE], self.config.reduce)

    def losses(self, teacher: nn.Module, batch: Tensors) -> Losses:
        """See `Objective.losses`."""
        state_BND = backbone_of(teacher, where=f"objective {self.name}").tokens(
            *input_list(self.task.io, batch["inputs"]))
        draws, given = self.config.draws, batch[KIND]
        noise = given["noise"].reshape(-1, len(self.config.horizons), self.cells, self.cells)
        data = (2.0 * given["future"].float() - 1).repeat_interleave(draws, 0)
        time = given["time"].flatten()
        point, velocity = on_path(noise, data, time, self.config.sigma)
        found = self.field(point, time, state_BND[:, 1:].repeat_interleave(draws, 0))
        # Any weight of times has the same best field. This one lets all count alike: unweighted, late times would rule,
        # where the noise is so small that the future can be read off the point and nothing is asked of the backbone.
        _, _, left_B111 = best_line(point, time)
        return {"velocity": F.mse_loss(found.float() / left_B111, velocity / left_B111)}

    def sample(self, tokens_BND: Tensor, noise: Tensor, *, steps: int = 0, method: Method | None = None) -> Tensor:
        """Futures (B, H, h, w), about -1 where free and 1 where occupied.

        Args:
            tokens_BND: Patch tokens (B, N, D), without the class token.
            noise: Standard normal (B, H, h, w): equal noise gives equal futures.
            steps: Of the solver; 0: as configured.
            method: `euler` or `heun`; None: as configured.
        """
        field = partial(self._velocity, tokens_BND)
        return walk(field, noise, steps=steps or self.config.steps, method=method or self.config.method)

    def _velocity(self, tokens_BND: Tensor, x: Tensor, t_B: Tensor) -> Tensor:
        velocity: Tensor = self.field(x, t_B, tokens_BND)
        return velocity.float()

    def predict_future(
        self, teacher: nn.Module, inputs: Mapping[str, Tensor], *, samples: int = 8, seed: int = 0, steps: int = 0,
    ) -> Tensor:
        """Probability that something will be seen in a cell, float32 (B, H, h, w): its share of the drawn futures.

        Args:
            teacher: Whose backbone this field was trained with.
            inputs: By name, (B, C, H, W) each.
            samples: Futures that are drawn for each input; their number bounds how finely chances are told apart.
            seed: Of the noise.
            steps: Of the solver; 0: as configured.
        """
        with evaluation_mode(teacher), evaluation_mode(self):
            backbone = backbone_of(teacher, where=f"objective {self.name}")
            tokens_BND = backbone.tokens(*input_list(self.task.io, inputs))[:, 1:]
            shape = (samples, len(tokens_BND), len(self.config.horizons), self.cells, self.cells)
            noise = noise_like(shape, seed=seed, device=tokens_BND.device)
            total = torch.zeros(shape[1:], device=tokens_BND.device)
            for one in noise:
                total += (self.sample(tokens_BND, one, steps=steps) > 0).float()
            return total / samples


def reduced(planes_BHhw: Array, factor: int) -> Array:
    """The maximum of every `factor` x `factor` cells: (B, H, h / factor, w / factor)."""
    *first, rows, columns = planes_BHhw.shape
    blocks = planes_BHhw.reshape(*first, rows // factor, factor, columns // factor, factor)
    return np.ascontiguousarray(blocks.max(axis=(-3, -1)))
