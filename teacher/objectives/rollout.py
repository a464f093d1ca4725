"""What a trained world model says of the frames to come: step by step, drawn or most likely, as occupancy.

Occupied is what the sensors show as another road user: a lidar hit or a vehicle of the camera.

Legend: B samples, T later frames, C sensor planes, H W cells, G codes of a frame, K codes, P cells of a code's square.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmdeploy.errors import ConfigError
from fmdeploy.teacher.objectives.nextcodes import MAX_FRAMES, ego_action
from fmdeploy.teacher.objectives.worldmodel import PLANES, WorldModel
from fmdeploy.training.device import evaluation_mode

OCCUPIED = (PLANES.index("lidar_hit"), PLANES.index("camera_vehicle"))


class Rollout(NamedTuple):
    """What is to come.

    Attributes:
        codes_BTG: int64 codes of the last draw (or the most likely, or the known ones).
        planes_BTCHW: Probability of each sensor plane's cells, mean over draws.
        occupied_BTHW: Probability that something is seen in a cell.
    """

    codes_BTG: Tensor
    planes_BTCHW: Tensor
    occupied_BTHW: Tensor


class CodeScores(NamedTuple):
    """How well the codes of each frame were foretold, given the true ones before it.

    Attributes:
        nats_BT: Mean cross entropy of a frame's codes.
        right_BT: Share of codes whose most likely value was right.
    """

    nats_BT: Tensor
    right_BT: Tensor


def next_logits(model: WorldModel, state_BND: Tensor, before_BTG: Tensor, action_BTF: Tensor | None) -> Tensor:
    """Logits (B, G, K) of the frame that follows T known ones (T from 0); one-step prediction.

    Args:
        model: The world model.
        state_BND: The backbone's tokens of the past.
        before_BTG: int64 codes of the frames 1 .. T after the present.
        action_BTF: As `ego_action` gives them, T + 1 frames or more; None without actions.
    """
    count, step = len(state_BND), before_BTG.shape[1] + 1
    first = max(1, step - model.config.window + 1)
    # The frame before the first is the present, whose codes the model never sees: any number stands in for them.
    padded_BTG = F.pad(before_BTG, (0, 0, 1, 0))
    first_B = torch.full((count,), first, device=state_BND.device)
    action = None if action_BTF is None else action_BTF[:, first - 1 : step]
    return model.predict(state_BND, padded_BTG[:, first - 1 : step], first_B == 1, first_B, action)[:, -1]


def rollout(
    model: WorldModel, state_BND: Tensor, *, frames: int = MAX_FRAMES, motion_BT3: Tensor | None = None,
    draws: int = 4, seed: int = 0, known_BTG: Tensor | None = None,
) -> Rollout:
    """Predict frame after frame, each from what was drawn before it.

    The last step of a path is never drawn: its probabilities are the expectation over the distribution of codes, and
    those are averaged over the paths.

    Args:
        model: The world model.
        state_BND: The backbone's tokens of the past.
        frames: T.
        motion_BT3: The ego's motion to each frame; wanted by a model with actions, and ignored by others.
        draws: Paths that are drawn; 0 follows the most likely codes.
        seed: Of the draws. All samples share the random numbers, so nothing hangs on which are in one batch.
        known_BTG: Codes of the frames 1 .. T to go on from in place of the drawn ones (teacher forcing).

    Raises:
        ConfigError: too many frames, or a model with actions is not told the motion.
    """
    action_BTF = _action(model, frames, motion_BT3)
    planes, occupied = _tables(model)
    forced = known_BTG is not None
    total, codes_BTG = torch.zeros(()), torch.zeros(())
    paths = 1 if forced or draws == 0 else draws
    for path in range(paths):
        codes_BTG, squares = state_BND.new_zeros((len(state_BND), 0, model.config.grid**2), dtype=torch.long), []
        for step in range(frames):
            logits_BGK = next_logits(model, state_BND, codes_BTG, action_BTF)
            squares.append(logits_BGK.softmax(-1) @ torch.cat((planes, occupied), dim=1))
            if known_BTG is not None:
                picked_BG = known_BTG[:, step]
            else:
                picked_BG = _pick(logits_BGK, None if draws == 0 else (seed, path, step))
            codes_BTG = torch.cat((codes_BTG, picked_BG[:, None]), dim=1)
        total = total + torch.stack(squares, 1) / paths
    flat = model.vae.picture(total.flatten(0, 1))
    pictures = flat.view(len(state_BND), frames, *flat.shape[1:])
    return Rollout(codes_BTG, pictures[:, :, :-1], pictures[:, :, -1])


def code_scores(
    model: WorldModel, state_BND: Tensor, codes_BTG: Tensor, motion_BT3: Tensor | None = None
) -> CodeScores:
    """One-step predictions of the true codes of frames 1 .. T, judged.

    Raises:
        ConfigError: as in `rollout`.
    """
    frames = codes_BTG.shape[1]
    action_BTF = _action(model, frames, motion_BT3)
    nats, right = [], []
    for step in range(frames):
        logits_BGK = next_logits(model, state_BND, codes_BTG[:, :step], action_BTF)
        wanted_BG = codes_BTG[:, step]
        nats.append(F.cross_entropy(logits_BGK.transpose(1, 2), wanted_BG, reduction="none").mean(1))
        right.append((logits_BGK.argmax(-1) == wanted_BG).float().mean(1))
    return CodeScores(torch.stack(nats, 1), torch.stack(right, 1))


def predict_future(
    model: WorldModel, teacher: nn.Module, inputs: Mapping[str, Tensor], *, frames: int = MAX_FRAMES,
    motion_BT3: Tensor | None = None, draws: int = 4, seed: int = 0,
) -> Tensor:
    """Probability (B, T, H, W) that something is seen in a cell of the frames 1 .. T after the present (5 a second).

    Args:
        model: The world model, trained with this teacher's backbone.
        teacher: As loaded beside it.
        inputs: A batch of the task's inputs.
        frames: T.
        motion_BT3: See `rollout`.
        draws: See `rollout`.
        seed: See `rollout`.
    """
    with evaluation_mode(teacher), evaluation_mode(model):
        state_BND = model.tokens(teacher, inputs)
        return rollout(model, state_BND, frames=frames, motion_BT3=motion_BT3, draws=draws, seed=seed).occupied_BTHW


def _action(model: WorldModel, frames: int, motion_BT3: Tensor | None) -> Tensor | None:
    if not 1 <= frames <= MAX_FRAMES:
        raise ConfigError("the world model does not look as far", where="frames", found=frames,
                          expected=f"1 .. {MAX_FRAMES}")
    if not model.config.actions:
        return None
    if motion_BT3 is None or motion_BT3.shape[1] < frames:
        raise ConfigError("this world model was trained with actions and must be told the ego's motion",
                          where="motion", expected=f"{frames} frames",
                          found="none" if motion_BT3 is None else motion_BT3.shape[1])
    return ego_action(motion_BT3[:, :frames])


def _tables(model: WorldModel) -> tuple[Tensor, Tensor]:
    """Probabilities of each code's cells: of every plane (K, C * P), and of being occupied (K, P)."""
    table_KCP = model.vae.table()
    free_KP = torch.stack([1 - table_KCP[:, plane] for plane in OCCUPIED]).prod(0)
    return table_KCP.flatten(1), 1 - free_KP


def _pick(logits_BGK: Tensor, key: tuple[int, int, int] | None) -> Tensor:
    """The most likely codes (B, G), or a draw by the Gumbel trick (arXiv:1611.01144, section 2) with noise of `key`."""
    if key is None:
        return logits_BGK.argmax(-1)
    seed, path, step = key
    generator = torch.Generator().manual_seed((seed * 1009 + path) * (MAX_FRAMES + 1) + step)
    noise_GK = -torch.empty(logits_BGK.shape[1:]).exponential_(generator=generator).log()
    return (logits_BGK + noise_GK.to(logits_BGK.device)).argmax(-1)
