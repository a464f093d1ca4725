"""Arrangements of sensors, by the name that metadata gives as `sensor_rig`.

What a rig cannot do, no weather mends: the worse of the two counts.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from fmdeploy.data.weather import CAMERA, LIDAR, CameraQuality, LidarQuality, Weather

RigName = Literal["roof-1", "bumper-1"]
DEFAULT_RIG: RigName = "roof-1"


class Rig(NamedTuple):
    """One arrangement."""

    thinning: int = 1
    """Every so manieth of the 512 beams of the lidar is there."""
    lidar_m: float = float("inf")
    """Its range at best."""
    camera_m: float = float("inf")
    """Range of the camera at best."""
    half_fov_deg: float = 180.0
    """Half of its horizontal field of view at most."""

    def lidar(self, weather: Weather) -> LidarQuality:
        """How the lidar fares."""
        quality = LIDAR[weather]
        return quality._replace(range_m=min(quality.range_m, self.lidar_m))

    def camera(self, weather: Weather) -> CameraQuality:
        """How the camera fares."""
        quality = CAMERA[weather]
        return quality._replace(range_m=min(quality.range_m, self.camera_m),
                                half_fov_deg=min(quality.half_fov_deg, self.half_fov_deg))


RIGS: dict[RigName, Rig] = {
    "roof-1": Rig(),
    "bumper-1": Rig(thinning=4, lidar_m=26.0, camera_m=24.0, half_fov_deg=45.0),
}
"""roof-1: the best there is. bumper-1: a low, cheap set, a lidar of 128 beams and a narrow camera."""
