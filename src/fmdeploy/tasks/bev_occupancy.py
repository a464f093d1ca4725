"""Task `bev-occupancy`: where vehicles are and will be around the ego, from the last 0.6 s of two sensors.

Legend: B batch, C channels, H W rows and columns of a 64 x 64 grid of 1 m cells (conventions: data/raster.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fmdeploy.data.format import Dataset
from fmdeploy.evaluate.frequency import frequencies
from fmdeploy.evaluate.metrics import ECE, Accuracy, DrivableIoU, OccupancyIoU, SoftIoU, TopLabelECE, horizon_metrics
from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.task import Array, Arrays, Geometry, Metric, Samples, Task, ValueT
from fmdeploy.tasks.bev_occupancy_samples import GRID, SCENES, BevSamples

if TYPE_CHECKING:
    from torch import Tensor, nn

HORIZONS = ("t", "+0.4s", "+0.8s", "+1.6s")
FRAMES = ("-0.6s", "-0.4s", "-0.2s", "t")
LIDAR = ("hit", "free")
CAMERA = ("vehicle", "drivable", "line")
PLANES = len(HORIZONS) + 1

# Occupied cells are 1.7 % of the grid: weighted cross entropy alone puts the best threshold below 0.5, Dice brings it
# back and is the larger gain; focal loss and dilated targets did worse (measured).
POSITIVE = (3.0, 3.0, 3.0, 3.0, 1.0)
PLANE_WEIGHT = (0.25, 0.25, 0.25, 0.25, 0.5)
DICE_WEIGHT = 0.5
SCENE_WEIGHT = 0.02


def _channels(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name}{frame}" if frame != "t" else name for frame in FRAMES for name in names)


class BevOccupancy(Task):
    """The embedded default, recorded from highway-env."""

    name = "bev-occupancy"
    teacher_layer = "tokens"
    student_layer = "trunk"
    frames = len(FRAMES)
    weighs_samples = True
    panel_legend = (
        "64 m around the ego (blue), driving up. Vehicles now red, in 0.4 s orange, in 0.8 s yellow, in 1.6 s green, "
        "fading with the probability; road grey. Inputs: lidar hits red on free space, camera vehicles orange."
    )

    @property
    def io(self) -> IOSpec:
        """`lidar` (8, 64, 64) and `camera` (12, 64, 64) to logits `bev` (5, 64, 64) and `scene` (8,)."""
        return _io()

    def metrics(self) -> tuple[Metric, ...]:
        """Mean occupancy IoU first, then each horizon, drivable area, soft IoU, calibration and the scene."""
        horizons = horizon_metrics(HORIZONS)
        return (OccupancyIoU(), *horizons, DrivableIoU(), SoftIoU(), ECE(), Accuracy("scene_accuracy"), TopLabelECE())

    def events(self) -> tuple[Metric, ...]:
        """A cell being occupied at each horizon, or drivable."""
        return frequencies("bev", "bev", (*HORIZONS, "drivable"))

    def samples(self, data: Dataset, split: str) -> Samples:
        """Fifteen samples a sequence, at 2.5 Hz."""
        return BevSamples.of(data, split)

    def loss(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
        """Weighted cross entropy plus batch Dice on the planes, and a little cross entropy on the scene.

        Args:
            outputs: float logits `bev` (B, 5, 64, 64) and `scene` (B, 8).
            targets: `bev` (B, 5, 64, 64) in {0, 1} and `scene` (B,).
        """
        import torch

        from fmdeploy.training.losses import class_loss, soft_dice, weighted_bce

        logits_BCHW, labels_BCHW, weight_B = outputs["bev"], targets["bev"].float(), targets.get("sample_weight")
        bce = weighted_bce(logits_BCHW, labels_BCHW, POSITIVE, PLANE_WEIGHT, weight_B)
        dice = soft_dice(torch.sigmoid(logits_BCHW), labels_BCHW, weight_B)
        return bce + DICE_WEIGHT * dice + SCENE_WEIGHT * class_loss(outputs["scene"], targets["scene"], weight_B)

    def distillation_loss(self, outputs: dict[str, Tensor], teacher_outputs: dict[str, Tensor]) -> Tensor:
        """KL to the teacher's probabilities plus batch Dice to them: exactly zero where the logits are equal."""
        import torch

        from fmdeploy.training.losses import bernoulli_kl, kl_divergence, soft_dice

        logits_BCHW, teacher_BCHW = outputs["bev"], teacher_outputs["bev"].float()
        dice = soft_dice(torch.sigmoid(logits_BCHW), torch.sigmoid(teacher_BCHW))
        scene = kl_divergence(outputs["scene"], teacher_outputs["scene"])
        return bernoulli_kl(logits_BCHW, teacher_BCHW) + DICE_WEIGHT * dice + SCENE_WEIGHT * scene

    def transform(self, values: dict[str, ValueT], geometry: Geometry) -> dict[str, ValueT]:
        """Move everything that is a map (B, C, H, W), arrays or tensors."""
        from fmdeploy.training.geometry import moved

        return {name: moved(value, geometry) if getattr(value, "ndim", 0) == 4 else value
                for name, value in values.items()}

    def teacher(self, options: Mapping[str, Any]) -> nn.Module:
        """Convolutional stem, DINOv2 transformer and U-Net decoder; options as in `BevTeacherConfig`."""
        from fmdeploy.config import validate
        from fmdeploy.models.bev_teacher import BevTeacher, BevTeacherConfig

        sizes = validate(BevTeacherConfig, options, where="teacher")
        return BevTeacher(self._channels(), PLANES, len(SCENES), sizes)

    def student(self, name: str, options: Mapping[str, Any]) -> nn.Module:
        """`cnn`, `vit` or `depthwise`, or anything `models.factory` knows."""
        from fmdeploy.models.bev_cnn import BevCnn
        from fmdeploy.models.bev_vit import BevVit
        from fmdeploy.models.depthwise import BevDepthwise
        from fmdeploy.models.factory import make_student

        built_in = {
            "cnn": lambda chosen: BevCnn(self._channels(), PLANES, len(SCENES), **chosen),
            "vit": lambda chosen: BevVit(self._channels(), PLANES, len(SCENES), **chosen),
            "depthwise": lambda chosen: BevDepthwise(self._channels(), PLANES, len(SCENES), **chosen),
        }
        return make_student(name, options, self.io, built_in)

    def baselines(self) -> Mapping[str, Callable[[Arrays], Arrays]]:
        """Copying what the sensors show at t."""
        from fmdeploy.tasks.bev_baselines import copy_both, copy_lidar

        sized = functools.partial(functools.partial, horizons=len(HORIZONS), scenes=len(SCENES))
        return {"copy lidar": sized(copy_lidar), "copy lidar | camera": sized(copy_both)}

    def corruptions(self) -> Mapping[str, Mapping[str, Callable[[Arrays, np.random.Generator], Arrays]]]:
        """Fog of three visibilities."""
        from fmdeploy.tasks.bev_fog import fog

        return {"fog": {f"{metres} m visibility": functools.partial(fog, visibility_m=metres)
                        for metres in (100, 50, 25)}}

    def panel(self, values: Arrays) -> Array:
        """A picture (64, 64, 3) uint8 of one sample: vehicles by horizon in colour on the drivable area."""
        if "bev" in values:
            return _picture(np.asarray(values["bev"], np.float32), probability=values["bev"].dtype.kind == "f")
        return _sensor_picture(np.asarray(values["lidar"], np.float32), np.asarray(values["camera"], np.float32))

    def _channels(self) -> tuple[int, ...]:
        return tuple(spec.shape[0] for spec in self.io.inputs)


@functools.cache
def _io() -> IOSpec:
    return IOSpec(
        inputs=(_grid("lidar", _channels(LIDAR), "lidar"), _grid("camera", _channels(CAMERA), "camera")),
        outputs=(
            TensorSpec(name="bev", shape=(PLANES, GRID, GRID), layout="CHW", channels=(*HORIZONS, "drivable")),
            TensorSpec(name="scene", shape=(len(SCENES),), layout="C", channels=SCENES),
        ),
        preprocessing="binary ego-centred grids, 1 m cells, row 0 ahead, column 0 left, oldest of 4 frames first",
    )


def _grid(name: str, channels: tuple[str, ...], sensor: str) -> TensorSpec:
    return TensorSpec(name=name, shape=(len(channels), GRID, GRID), layout="CHW", value_range=(0.0, 1.0),
                      channels=channels, sensor=sensor)


COLOURS_C3 = np.array([[230, 25, 25], [240, 140, 20], [235, 205, 40], [120, 190, 60]], np.float32)
ROAD_3 = np.array([70, 74, 82], np.float32)
GROUND_3 = np.array([24, 26, 30], np.float32)
FREE_3 = np.array([44, 62, 80], np.float32)
LINE_3 = np.array([200, 200, 200], np.float32)
EGO = (slice(30, 35), slice(31, 33))


def _picture(bev_CHW: Array, *, probability: bool) -> Array:
    """Planes as colour: the later the horizon, the yellower; logits fade by their probability."""
    if probability:
        bev_CHW = 1 / (1 + np.exp(-np.clip(bev_CHW, -30, 30)))
    image_HW3 = GROUND_3 + bev_CHW[-1][..., None] * (ROAD_3 - GROUND_3)
    for plane_HW, colour_3 in reversed(list(zip(bev_CHW[:-1], COLOURS_C3, strict=True))):
        image_HW3 = image_HW3 + plane_HW[..., None] * (colour_3 - image_HW3)
    return _with_ego(image_HW3)


def _sensor_picture(lidar_CHW: Array, camera_CHW: Array) -> Array:
    """The newest frame: drivable area and lines of the camera, free space and hits of the lidar."""
    hit_HW, free_HW = lidar_CHW[-2:]
    vehicle_HW, road_HW, line_HW = camera_CHW[-3:]
    image_HW3 = GROUND_3 + road_HW[..., None] * (ROAD_3 - GROUND_3)
    planes = (0.5 * free_HW, 0.6 * line_HW, 0.7 * vehicle_HW, hit_HW)
    for plane_HW, colour_3 in zip(planes, (FREE_3, LINE_3, COLOURS_C3[1], COLOURS_C3[0]), strict=True):
        image_HW3 = image_HW3 + plane_HW[..., None] * (colour_3 - image_HW3)
    return _with_ego(image_HW3)


def _with_ego(image_HW3: Array) -> Array:
    image_HW3[EGO] = (90, 160, 255)
    return np.clip(image_HW3, 0, 255).astype(np.uint8)
