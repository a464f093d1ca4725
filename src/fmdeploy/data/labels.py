"""Rare cases: time to collision, near-collisions and cut-ins, frame by frame."""

# T frames, N vehicles and obstacles

from __future__ import annotations

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.data.raster import boxes_in_ego_frame, near_columns, to_ego
from fmdeploy.data.scenes import FRAME_S, HEADING, LENGTH, SPEED, Scene

NEAR_COLLISION_S = 2.0
CUT_IN_GAP_M = 20.0
CUT_IN_S = 2.0
"""A cut-in stays one for this long, unless the gap opens."""


def rare_cases(scene: Scene, ego: int) -> Arrays:
    """`ttc` float32 (T,) in s, `rare_near_collision` bool (T,) (ttc below 2 s) and `rare_cut_in` bool (T,)."""
    ttc_T = time_to_collision(scene, ego)
    near_T = np.asarray(ttc_T < NEAR_COLLISION_S)
    return {"ttc": ttc_T, "rare_near_collision": near_T, "rare_cut_in": cut_ins(scene, ego)}


def time_to_collision(scene: Scene, ego: int) -> Array:
    """float32 (T,): seconds until the ego touches another vehicle if both keep velocity and heading; inf if never.

    Boxes are those that bound the vehicles along the ego's axes (a swept-box test), so it errs on the early side
    for vehicles that drive at an angle.
    """
    box_TN5 = boxes_in_ego_frame(scene.box_TN6, ego)
    if box_TN5.shape[1] == 0:
        return np.full(len(box_TN5), np.inf, np.float32)
    closing_TN2 = _relative_velocity(scene, ego)
    cos, sin = np.abs(np.cos(box_TN5[..., 2])), np.abs(np.sin(box_TN5[..., 2]))
    length, width = box_TN5[..., 3], box_TN5[..., 4]
    half_TN2 = np.stack([length * cos + width * sin, length * sin + width * cos], -1) / 2
    half_TN2 = half_TN2 + scene.box_TN6[:, ego, None, LENGTH:] / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        one, other = (-half_TN2 - box_TN5[..., :2]) / closing_TN2, (half_TN2 - box_TN5[..., :2]) / closing_TN2
    still = closing_TN2 == 0
    touching = np.abs(box_TN5[..., :2]) < half_TN2
    enter = np.where(still, np.where(touching, -np.inf, np.inf), np.minimum(one, other)).max(axis=-1)
    leave = np.where(still, np.inf, np.maximum(one, other)).min(axis=-1)
    hits_TN = (enter <= leave) & (leave > 0)
    return np.asarray(np.where(hits_TN, np.maximum(enter, 0), np.inf).min(axis=1), np.float32)


def _relative_velocity(scene: Scene, ego: int) -> Array:
    """(T, M, 2) m/s: velocities of the others less the ego's, along the ego's axes; columns as in the boxes."""
    box_TN6 = scene.box_TN6
    course_TN2 = np.stack([np.cos(box_TN6[..., HEADING]), np.sin(box_TN6[..., HEADING])], -1)
    moved_TN2 = box_TN6[..., :2] + box_TN6[..., SPEED, None] * course_TN2
    velocity_TN2 = to_ego(moved_TN2, box_TN6[:, ego]) - to_ego(box_TN6[..., :2], box_TN6[:, ego])
    relative_TN2 = velocity_TN2 - velocity_TN2[:, ego, None]
    return np.asarray(relative_TN2[:, near_columns(box_TN6, ego)])


def cut_ins(scene: Scene, ego: int) -> Array:
    """Bool (T,): within the last two seconds a vehicle came into the ego's lane less than 20 m ahead and is there."""
    lane_TN, along_TN, length_TN = scene.lane_TN, scene.along_TN, scene.box_TN6[..., LENGTH]
    own_T1 = lane_TN[:, ego, None]
    gap_TN = along_TN - along_TN[:, ego, None] - (length_TN + length_TN[:, ego, None]) / 2
    with np.errstate(invalid="ignore"):
        ahead_TN = (lane_TN == own_T1) & (along_TN > along_TN[:, ego, None]) & (gap_TN < CUT_IN_GAP_M)
    entered_TN = np.zeros_like(ahead_TN)
    stayed_T1 = own_T1[1:] == own_T1[:-1]
    entered_TN[1:] = ahead_TN[1:] & stayed_T1 & (lane_TN[:-1] != own_T1[:-1]) & (lane_TN[:-1] >= 0)
    entered_TN[:, ego] = False
    recent_TN = entered_TN.copy()
    for frames in range(1, round(CUT_IN_S / FRAME_S) + 1):
        recent_TN[frames:] |= entered_TN[:-frames]
    return np.asarray(np.any(recent_TN & ahead_TN, axis=1))
