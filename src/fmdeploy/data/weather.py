"""What rain, fog and night do to each sensor.

Lidar sees by its own light: night does not trouble it, fog and rain shorten its range, swallow beams and return some
from drops. A camera sees by the light there is: night and fog shorten its range, and every weather makes it miss
vehicles and misjudge their distance. The numbers are plausible, not measured; they are part of the dataset's recipe.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Weather = Literal["clear", "rain", "fog", "night"]
WEATHERS: tuple[Weather, ...] = ("clear", "rain", "fog", "night")


class LidarQuality(NamedTuple):
    """How a lidar fares."""

    range_m: float
    dropout: float
    """Share of beams that never return."""
    clutter: float
    """Share of beams that return from drops, a few metres away."""
    noise_m: float
    """Standard deviation of a measured distance."""


class CameraQuality(NamedTuple):
    """How a camera with its semantic segmentation fares."""

    range_m: float
    half_fov_deg: float
    """Half of the horizontal field of view, around straight ahead."""
    miss: float
    """Chance that a visible vehicle is not found in a frame."""
    depth_noise: float
    """Standard deviation of a vehicle's distance, as a share of that distance."""
    label_noise: float
    """Share of drivable and line cells that are lost."""


LIDAR: dict[Weather, LidarQuality] = {
    "clear": LidarQuality(range_m=48.0, dropout=0.02, clutter=0.000, noise_m=0.05),
    "rain": LidarQuality(range_m=34.0, dropout=0.15, clutter=0.010, noise_m=0.12),
    "fog": LidarQuality(range_m=18.0, dropout=0.25, clutter=0.020, noise_m=0.20),
    "night": LidarQuality(range_m=48.0, dropout=0.02, clutter=0.000, noise_m=0.05),
}
CAMERA: dict[Weather, CameraQuality] = {
    "clear": CameraQuality(range_m=46.0, half_fov_deg=75.0, miss=0.03, depth_noise=0.015, label_noise=0.01),
    "rain": CameraQuality(range_m=30.0, half_fov_deg=70.0, miss=0.12, depth_noise=0.030, label_noise=0.05),
    "fog": CameraQuality(range_m=16.0, half_fov_deg=70.0, miss=0.15, depth_noise=0.040, label_noise=0.08),
    "night": CameraQuality(range_m=24.0, half_fov_deg=60.0, miss=0.15, depth_noise=0.030, label_noise=0.05),
}
