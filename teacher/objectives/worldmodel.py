"""Objective `worldmodel`: predict the codes of the frames to come from the backbone's tokens of the past.

A VQ-VAE (`vqvae`, arXiv:1711.00937) turns each observed frame into codes; a causal transformer (`nextcodes`) predicts
them from the backbone's tokens and the codes of frames before, with the true codes fed in during training (teacher
forcing). The tokeniser is trained in a first share of the steps and then held: trained on, codes change hands faster
than a predictor can learn their names (measured: after 50 joint steps it was right on 0.02 % of them).

The present frame's codes are never given: what is around the ego now, and how it moves, must come from the backbone,
and that trains it. No label is read. The recording shows every frame in the ego's own frame at that instant, so the
ego's own motion shifts the picture; `actions` tells the model of it.

Legend: B batch, T later frames, C sensor planes, H W cells, W frames of one window, N places, M codes of a place,
G = N * M codes of a frame, K codes, D their length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from pydantic import Field
from torch import Tensor, nn

from fmdeploy.errors import ConfigError, DataError
from fmdeploy.models import input_list
from fmdeploy.models.tokens import backbone_of
from fmdeploy.task import Array, Arrays, Samples, Task
from fmdeploy.tasks.bev_occupancy_samples import CAMERA_PLANES, GRID, LIDAR_PLANES
from fmdeploy.teacher.objectives.base import Objective, ObjectiveConfig
from fmdeploy.teacher.objectives.frames import Recorded
from fmdeploy.teacher.objectives.nextcodes import MAX_FRAMES, NextCodes, ego_action
from fmdeploy.teacher.objectives.vqvae import FrameVAE, perplexity
from fmdeploy.training.loop import Losses, Tensors
from fmdeploy.training.sampler import Index

PLANES = (*LIDAR_PLANES, *CAMERA_PLANES)
MIRROR_3 = np.array([1.0, -1.0, -1.0], np.float32)  # what mirroring does to metres ahead, metres left and radians left
# What a lidar hits and a camera calls a vehicle fills 1 % of the cells, and little of it: unweighted, no code is ever
# spent on it (measured). Whole planes are weighted, not outcomes, so the decoded probabilities stay calibrated.
PLANE_WEIGHT = (1.6, 0.08, 3.2, 0.16, 0.16)
RESTARTING = 0.8  # share of the tokeniser's steps in which dead codes restart; the others settle
AT_ONCE = 0.5  # share of the windows that start right after the present
KIND = "worldmodel"


@runtime_checkable
class FrameSamples(Recorded, Protocol):
    """What the objective asks of samples beyond their batches."""

    def motion(self, index: Array, offsets: Sequence[int]) -> Array:
        """The ego's motion to these frames, float32 (B, n, 3)."""


class WorldModelConfig(ObjectiveConfig):
    """Sizes and options."""

    grid: Literal[8, 16] = Field(default=16, description="codes a side of a frame")
    codes: int = Field(default=512, ge=2, le=8192, description="vectors in the codebook")
    code_dim: int = Field(default=16, ge=2, description="their length")
    hidden: int = Field(default=128, ge=8, description="width of the frame encoder and decoder")
    width: int = Field(default=128, ge=8, description="width of the predictor; a multiple of its heads")
    depth: int = Field(default=2, ge=1, description="blocks of the predictor")
    heads: int = Field(default=4, ge=1, description="attention heads of the predictor")
    window: int = Field(default=2, ge=1, le=MAX_FRAMES, description="frames in a row that are trained at once")
    forget: float = Field(default=0.5, ge=0, le=1, description=(
        "share of later windows whose first frame must be predicted without the codes before it"))
    actions: bool = Field(default=False, description="tell the predictor how the ego moves (array ego_motion)")
    commitment: float = Field(default=0.25, ge=0, description="weight of the commitment loss")
    decay: float = Field(default=0.98, ge=0, lt=1, description="of the codebook's moving averages")
    tokenizer_share: float = Field(default=0.25, gt=0, lt=1, description=(
        "share of the steps, the first ones, in which the frame tokeniser alone is trained"))


class WorldModel(Objective):
    """Parts `codes` (cross entropy of the next codes, nats), `frames` (reconstruction) and `commitment`.

    Raises:
        ConfigError: the task's frames are not those of `bev-occupancy`, or sizes do not fit together.
    """

    name = KIND
    kept = True
    shardable = False  # it touches weights of blocks that rest and so are not gathered
    Config = WorldModelConfig
    config: WorldModelConfig
    done: Tensor

    def __init__(self, task: Task, teacher: nn.Module, config: ObjectiveConfig, *, steps: int) -> None:
        super().__init__(task, teacher, config, steps=steps)
        chosen, backbone = self.config, backbone_of(teacher, where=f"task {task.name}")
        if backbone.side * backbone.patch != GRID or chosen.grid % backbone.side:
            raise ConfigError("the codes do not lie over the backbone's tokens", where="worldmodel.grid",
                              found=f"{chosen.grid} codes, {backbone.side} tokens a side of "
                                    f"{backbone.side * backbone.patch} cells", expected=f"a multiple, {GRID} cells")
        if chosen.width % chosen.heads:
            raise ConfigError(f"width {chosen.width} must be a multiple of heads {chosen.heads}", where="worldmodel")
        self.side, self.step = backbone.side, chosen.grid // backbone.side
        self.vae = FrameVAE(planes=len(PLANES), size=GRID, grid=chosen.grid, codes=chosen.codes, dim=chosen.code_dim,
                            hidden=chosen.hidden, decay=chosen.decay)
        self.predictor = NextCodes(
            places=self.side**2, merge=self.step**2, codes=chosen.codes, code_dim=chosen.code_dim,
            context_dim=backbone.dim, width=chosen.width, depth=chosen.depth, heads=chosen.heads,
            actions=chosen.actions)
        self.first_steps = max(1, round(chosen.tokenizer_share * steps))
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))
        self._right: list[Tensor] = []

    def arrays(self, samples: Samples, index: Index, rngs: Sequence[Generator]) -> Mapping[str, Arrays]:
        """A window of frames for each sample, and the ego's motion.

        Returns:
            Kind `worldmodel`: `planes` uint8 (B, (1 + W) * C, H, W), the frame before the window and its frames;
            `motion` float32 (B, T, 3, 2), whose last axis is the motion and its mirror image: mirroring a sample
            flips the last axis of all four-dimensional arrays, and the first entry then is the right one.
            Kind `worldmodel.fixed`: `first` int64, `blank` bool and `draw` float32 (B, 1 + W).

        Raises:
            DataError: the samples have no frames, or no motion though `actions` is set.
        """
        if not isinstance(samples, FrameSamples):
            raise DataError("the samples have no frames to predict", where="objective worldmodel",
                            expected="those of bev-occupancy", found=type(samples).__name__)
        window = self.config.window
        first_B = np.array([_first(rng, window) for rng in rngs], np.int64)
        blank_B = (first_B == 1) | np.array([rng.random() < self.config.forget for rng in rngs])
        draw = np.array([rng.random(1 + window) for rng in rngs], np.float32)
        frames = [samples.frames(index[k : k + 1], range(first - 1, first + window)) for k, first in enumerate(first_B)]
        wanted = {"planes": np.concatenate(frames).reshape(len(index), -1, GRID, GRID)}
        if self.config.actions:
            motion_BT3 = samples.motion(index, range(1, MAX_FRAMES + 1))
            wanted["motion"] = np.stack((motion_BT3, motion_BT3 * MIRROR_3), axis=-1)
        return {KIND: wanted, f"{KIND}.fixed": {"first": first_B, "blank": blank_B, "draw": draw}}

    @property
    def unmirrored(self) -> frozenset[str]:
        """See `Objective.unmirrored`."""
        return frozenset({f"{KIND}.fixed"})

    def losses(self, teacher: nn.Module, batch: Tensors) -> Losses:
        """See `Objective.losses`; without gradient, `codes` is log K (a guess) at first and the others 0 later."""
        mine, fixed = batch[KIND], batch[f"{KIND}.fixed"]
        frames_BTCHW = mine["planes"].view(len(fixed["first"]), -1, len(PLANES), GRID, GRID).float()
        nothing = _nothing(self.resting(teacher, int(self.done)))
        if int(self.done) < self.first_steps:
            found, logits = self.vae(frames_BTCHW.flatten(0, 1), fixed["draw"].flatten())
            return {"codes": nothing + math.log(self.config.codes),
                    "frames": _reconstruction(logits, frames_BTCHW.flatten(0, 1)),
                    "commitment": self.config.commitment * found.commitment}
        codes_BTG = self.vae.codes(frames_BTCHW.flatten(0, 1)).view(*frames_BTCHW.shape[:2], -1)
        logits_BWGK = self.predict(self.tokens(teacher, batch["inputs"]), codes_BTG[:, :-1], fixed["blank"],
                                   fixed["first"], self._window_actions(mine, fixed["first"]))
        wanted_BWG = codes_BTG[:, 1:]
        self._right.append((logits_BWGK.detach().argmax(-1) == wanted_BWG).float().mean())
        return {"codes": F.cross_entropy(logits_BWGK.flatten(0, 2), wanted_BWG.flatten()),
                "frames": nothing, "commitment": nothing}

    def after_step(self, teacher: nn.Module, step: int) -> Mapping[str, Tensor]:
        """Move the codebook while the tokeniser is trained.

        Returns:
            `perplexity` and `restarted` of `Codebook.update`, then of the codebook as it was left; `code_accuracy`.
        """
        self.done.fill_(step + 1)
        if step < self.first_steps:
            seen = self.vae.book.update(restart=step < RESTARTING * self.first_steps)
            return {**seen, "code_accuracy": torch.zeros((), device=self.done.device)}
        right, self._right = torch.stack(self._right).mean(), []
        return {"perplexity": perplexity(self.vae.book.count_K), "restarted": torch.zeros_like(right),
                "code_accuracy": right}

    def resting(self, teacher: nn.Module, step: int) -> Sequence[nn.Parameter]:
        """The backbone and the predictor while the tokeniser is trained, then the tokeniser."""
        if step < self.first_steps:
            return [*backbone_of(teacher, where=KIND).parameters(), *self.predictor.parameters()]
        return list(self.vae.parameters())

    def changes(self) -> Sequence[int]:
        """The tokeniser comes first, then the predictor and the backbone."""
        return (self.first_steps,)

    def look_ahead(self, step: int, processes: int = 1) -> None:
        """See `Objective.look_ahead`."""
        self.done.fill_(step)

    def tokens(self, teacher: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """The backbone's tokens (B, 1 + N, D) of a batch's inputs."""
        backbone = backbone_of(teacher, where=f"task {self.task.name}")
        return backbone.tokens(*input_list(self.task.io, dict(inputs)))

    def predict(
        self, state_BND: Tensor, before_BWG: Tensor, blank_B: Tensor, first_B: Tensor, action_BWF: Tensor | None
    ) -> Tensor:
        """Logits float32 (B, W, G, K) of the codes of the frames first, first + 1, ...

        Args:
            state_BND: The backbone's tokens of the past.
            before_BWG: Codes of the frame before each of them.
            blank_B: Where the first of those is to be ignored.
            first_B: int64, from 1.
            action_BWF: As `ego_action` gives them; None without actions.
        """
        vectors_BWGD = self.vae.book.codebook_KD[before_BWG]
        logits = self.predictor(state_BND, self._to_places(vectors_BWGD), blank_B, first_B, action_BWF)
        return self._to_grid(logits.float())

    def _window_actions(self, mine: Mapping[str, Tensor], first_B: Tensor) -> Tensor | None:
        if "motion" not in mine:
            return None
        action_BTF = ego_action(mine["motion"][..., 0])
        steps_BW = first_B[:, None] - 1 + torch.arange(self.config.window, device=first_B.device)
        return action_BTF.gather(1, steps_BW[..., None].expand(-1, -1, action_BTF.shape[-1]))

    def _to_places(self, vectors_BWGD: Tensor) -> Tensor:
        """Vectors on the grid of codes (B, W, G, D) to those of each place, (B, W, N, M * D)."""
        side, step, (count, window, _, dim) = self.side, self.step, vectors_BWGD.shape
        grid = vectors_BWGD.view(count, window, side, step, side, step, dim).transpose(3, 4)
        return grid.reshape(count, window, side * side, step * step * dim)

    def _to_grid(self, logits_BWNMK: Tensor) -> Tensor:
        """The inverse for logits: (B, W, N, M, K) to (B, W, G, K)."""
        side, step, (count, window, _, _, codes) = self.side, self.step, logits_BWNMK.shape
        grid = logits_BWNMK.reshape(count, window, side, side, step, step, codes).transpose(3, 4)
        return grid.reshape(count, window, -1, codes)


def _nothing(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Zero, with a gradient of zero for each parameter that wants one: DistributedDataParallel waits for all."""
    wanted = [parameter.flatten()[0].float() for parameter in parameters if parameter.requires_grad]
    return 0.0 * torch.stack(wanted).sum()


def _reconstruction(logits_BCHW: Tensor, frame_BCHW: Tensor) -> Tensor:
    loss_BCHW = F.binary_cross_entropy_with_logits(logits_BCHW, frame_BCHW, reduction="none")
    return (loss_BCHW.mean((0, 2, 3)) * loss_BCHW.new_tensor(PLANE_WEIGHT)).sum()


def _first(rng: Generator, window: int) -> int:
    """The first frame of a window: right after the present in half of them, else anywhere later."""
    last = MAX_FRAMES + 1 - window
    if last == 1 or rng.random() < AT_ONCE:
        return 1
    return int(rng.integers(2, last + 1))


def constant_motion(motion_B3: Any, frames: int) -> Any:
    """The ego going on as it came: its last motion (B, 3), repeated to (B, frames, 3); arrays or tensors."""
    repeat = torch.stack if isinstance(motion_B3, Tensor) else np.stack
    return repeat([motion_B3] * frames, 1)
