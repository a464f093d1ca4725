"""How the ego moved between frames: the action that a world model may be told."""

# T frames

from __future__ import annotations

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.data.raster import to_ego
from fmdeploy.data.scenes import HEADING, Scene


def ego_motion(scene: Scene, ego: int) -> Array:
    """float32 (T, 3): metres ahead, metres to the left and radians to the left since the frame before.

    In the ego's frame at that earlier instant; zeros for the first frame.
    """
    pose_T6 = scene.box_TN6[:, ego]
    motion_T3 = np.zeros((len(pose_T6), 3), np.float32)
    motion_T3[1:, :2] = to_ego(pose_T6[1:, None, :2], pose_T6[:-1])[:, 0]
    turned_T = pose_T6[:-1, HEADING] - pose_T6[1:, HEADING]  # headings turn to the right where y points down
    motion_T3[1:, 2] = (turned_T + np.pi) % (2 * np.pi) - np.pi
    return motion_T3
