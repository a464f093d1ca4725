from __future__ import annotations

import numpy as np

from fmdeploy.data.motion import ego_motion
from fmdeploy.data.raster import to_ego
from fmdeploy.data.scenes import HEADING, SPEED, simulate


def test_motion_takes_the_ego_from_frame_to_frame() -> None:
    """Undoing each motion puts the ego's old place where the next frame sees it."""
    scene = simulate("roundabout", 3, frames=12, egos=1)
    ego = scene.egos[0]
    motion_T3, pose_T6 = ego_motion(scene, ego), scene.box_TN6[:, ego]
    assert motion_T3.shape == (12, 3)
    assert motion_T3.dtype == np.float32
    assert not motion_T3[0].any()
    seen_T2 = to_ego(pose_T6[:-1, None, :2], pose_T6[1:])[:, 0]  # where it was, from where it is
    cos, sin = np.cos(motion_T3[1:, 2]), np.sin(motion_T3[1:, 2])
    ahead, left = -motion_T3[1:, 0], -motion_T3[1:, 1]
    np.testing.assert_allclose(seen_T2, np.stack([ahead * cos + left * sin, left * cos - ahead * sin], -1), atol=1e-4)


def test_motion_has_the_speed_of_the_ego() -> None:
    scene = simulate("highway", 5, frames=12, egos=1)
    ego = scene.egos[0]
    speed_T = np.hypot(*ego_motion(scene, ego)[1:, :2].T) / 0.2
    pose_T6 = scene.box_TN6[:, ego]
    mean_T = (pose_T6[1:, SPEED] + pose_T6[:-1, SPEED]) / 2
    np.testing.assert_allclose(speed_T, mean_T, rtol=0.05)
    assert np.abs(np.diff(pose_T6[:, HEADING])).max() < 0.2
