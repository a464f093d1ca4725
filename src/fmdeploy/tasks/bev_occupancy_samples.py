"""Samples of `bev-occupancy`: four past frames of both sensors, occupancy now and later, bit-packed in memory.

A sample is frame t of a sequence, t = 3, 5, ... as far as the last horizon reaches (3..31 of 40 frames). Future labels
are simply later frames: what the ego will have around it, in its own frame at that later instant.

Planes are decoded a shard at a time and kept within a budget (`data.blocks`); what every sample is called and how it is
labelled stays in memory.
"""

# N samples, B batch, F frames of all sequences, K = 5 sensor planes, P = 64 * 64 cells

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fmdeploy.data.blocks import BlockRows, Blocks, Labels, Names, runs
from fmdeploy.data.format import Dataset
from fmdeploy.data.highway import OFF_ROAD
from fmdeploy.data.sequence import SequenceInfo
from fmdeploy.errors import DataError
from fmdeploy.task import Array, Arrays

GRID = 64
PLANE_BYTES = GRID * GRID // 8
LIDAR_PLANES = ("lidar_hit", "lidar_free")
CAMERA_PLANES = ("camera_vehicle", "camera_drivable", "camera_line")
SENSOR_PLANES = (*LIDAR_PLANES, *CAMERA_PLANES)
LABEL_PLANES = ("occupancy", "drivable")
RARE_ARRAYS = ("rare_cut_in", "rare_near_collision")
RARE = ("cut-in", "near-collision", "none")
"""Labels of the slice `rare`."""
PAST = 4
HORIZONS = (0, 2, 4, 8)
"""Frames ahead: 0, 0.4, 0.8 and 1.6 s at 5 frames a second."""
STRIDE = 2
SCENES = ("highway", "merge", "roundabout", "intersection", "exit", "two-way", "u-turn", "racetrack")
"""Classes of the output `scene`, in order."""


@dataclass(frozen=True)
class BevSamples:
    """Samples of one split; see `task.Samples`. Planes stay packed, eight cells a byte."""

    ids: Names
    groups: Array
    """int64 (N,): samples of one simulation share a number."""
    slices: Labels
    planes: BlockRows
    """Of F frames: `sensors` uint8 (F, 5, 512), planes in the order of LIDAR_PLANES, CAMERA_PLANES; `occupancy` and
    `drivable` uint8 (F, 512); `ego_motion` float32 (F, 3) where the dataset has it, see `data.motion.ego_motion`."""
    frame_N: Array
    """int (N,): row of each sample's present frame."""
    scene_N: Array
    """int64 (N,): its class in SCENES; -1: of none."""
    sequence_N: Array = field(repr=False)
    """int (N,): number of its sequence within the split."""

    @classmethod
    def of(cls, data: Dataset, split: str, *, budget: int | None = None) -> BevSamples:
        """The samples of `split` (train, val, test or all), of which `budget` bytes of planes are kept in memory.

        Raises:
            DataError: the split is empty, or the dataset is not one of driving scenes.
        """
        sequences = data.split(split)
        glance = _glance(data, sequences)
        frames = [np.arange(PAST - 1, sequence.frames - HORIZONS[-1], STRIDE) for sequence in sequences]
        number_N = np.repeat(np.arange(len(sequences), dtype=np.int32), [len(f) for f in frames])
        if not len(number_N):
            raise DataError(f"the sequences of {split!r} are too short", where=data.artifact.root,
                            expected=f"at least {PAST + HORIZONS[-1]} frames")
        time_N = np.concatenate(frames)
        first = np.cumsum([0] + [sequence.frames for sequence in sequences])
        frame_N = first[number_N] + time_N
        planes = _planes(data, sequences, glance.moves, budget)
        return cls(
            ids=Names([s.id for s in sequences], number_N, time_N.astype(np.int32)),
            groups=_numbered([s.group for s in sequences])[number_N],
            slices=_slices(sequences, number_N, glance.rare_F[frame_N]), planes=planes, frame_N=frame_N,
            scene_N=np.array([_scene(s, data) for s in sequences], np.int64)[number_N], sequence_N=number_N,
        )

    @property
    def blocks(self) -> Blocks:
        """How the samples lie in shards; see `training.sampler.make_sampler`."""
        return self.planes.blocks(self.frame_N)

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, index: Array) -> tuple[Arrays, Arrays]:
        """Inputs and targets of the samples `index` (B,), see the task's `io`.

        Inputs are `lidar` float32 (B, 8, 64, 64) and `camera` float32 (B, 12, 64, 64), zeros and ones, oldest frame
        first; targets are `bev` uint8 (B, 5, 64, 64) and `scene` int64 (B,).
        """
        frame_B = self.frame_N[index]
        past_BT = frame_B[:, None] + np.arange(1 - PAST, 1)
        later_BH = frame_B[:, None] + np.array(HORIZONS)
        now_B1P8 = self.planes.take("drivable", frame_B)[:, None]
        bev_BHP8 = np.concatenate([self.planes.take("occupancy", later_BH), now_B1P8], axis=1)
        lidar, camera = _floats(self.planes.take("sensors", past_BT), (len(LIDAR_PLANES), len(CAMERA_PLANES)))
        return {"lidar": lidar, "camera": camera}, {"bev": _cells(bev_BHP8), "scene": self.scene_N[index]}

    def frames(self, index: Array, offsets: Sequence[int]) -> Array:
        """Sensor planes uint8 (B, len(offsets), 5, 64, 64) of other frames of the samples `index` (B,).

        Args:
            index: Numbers of the samples.
            offsets: Frames from the present one, -3 .. 8: always inside the sample's sequence.
        """
        packed_BTKP8 = self.planes.take("sensors", self._rows(index, offsets))
        return _cells(packed_BTKP8.reshape(len(index), -1, packed_BTKP8.shape[-1])).reshape(
            len(index), len(offsets), len(SENSOR_PLANES), GRID, GRID)

    def occupancy(self, index: Array, offsets: Sequence[int]) -> Array:
        """Labelled vehicle occupancy uint8 (B, len(offsets), 64, 64) at other frames; offsets as in `frames`."""
        return _cells(self.planes.take("occupancy", self._rows(index, offsets)))

    def motion(self, index: Array, offsets: Sequence[int]) -> Array:
        """How the ego came to other frames, float32 (B, len(offsets), 3); offsets as in `frames`.

        Raises:
            DataError: the dataset has no `ego_motion`.
        """
        if "ego_motion" not in self.planes.layout:
            raise DataError("the dataset has no array 'ego_motion'", fix="Record it again: fmdeploy data record")
        return self.planes.take("ego_motion", self._rows(index, offsets))

    def _rows(self, index: Array, offsets: Sequence[int]) -> Array:
        if min(offsets) < 1 - PAST or max(offsets) > HORIZONS[-1]:
            raise DataError("asks for frames outside the samples", expected=f"{1 - PAST} .. {HORIZONS[-1]}",
                            found=f"{min(offsets)} .. {max(offsets)}")
        return np.asarray(self.frame_N[index][:, None] + np.array(offsets))


def _floats(packed_BTKP8: Array, planes: tuple[int, ...]) -> list[Array]:
    """Float32 (B, T * k, 64, 64) for each k of `planes`: the next k of the packed planes (B, T, K, 512).

    All share one allocation: several of a few MB each make glibc give the memory back every time, and faulting the
    pages in again costs several times more than filling them.
    """
    count, past = packed_BTKP8.shape[:2]
    buffer = np.empty(count * past * sum(planes) * GRID * GRID, np.float32)
    first, filled, grids = 0, 0, []
    for k in planes:
        grid = buffer[filled : filled + count * past * k * GRID * GRID].reshape(count, past * k, GRID, GRID)
        np.copyto(grid, _cells(packed_BTKP8[:, :, first : first + k].reshape(count, past * k, -1)))
        first, filled = first + k, filled + grid.size
        grids.append(grid)
    return grids


def _cells(packed_BCP8: Array) -> Array:
    """uint8 (B, C, 64, 64), zeros and ones, from packed planes (B, C, 512)."""
    return np.unpackbits(packed_BCP8, axis=-1).reshape(*packed_BCP8.shape[:2], GRID, GRID)


class _Glance(NamedTuple):
    """What a first look at every sequence found."""

    rare_F: Array
    """uint8 (F,): number of each frame's rare case in RARE."""
    moves: bool
    """Whether there is `ego_motion` everywhere."""


def _glance(data: Dataset, sequences: Sequence[SequenceInfo]) -> _Glance:
    """Check the planes of every sequence without unpacking them, and read the little that stays in memory."""
    rare, moves = [], True
    for sequence, layout, arrays in data.glances(sequences, RARE_ARRAYS.__contains__):
        for name in (*LIDAR_PLANES, *CAMERA_PLANES, *LABEL_PLANES):
            dtype, shape = layout.get(name, (None, ()))
            if dtype != np.uint8 or shape[1:] != (PLANE_BYTES,):
                raise DataError(f"sequence {sequence.id} has no usable plane {name!r}", where=data.artifact.root,
                                expected="uint8[frames, 512]", found=f"{dtype}{list(shape)}" if dtype else "none",
                                fix="Record one with: fmdeploy data record")
        if lost := [name for name in RARE_ARRAYS if name not in arrays]:
            raise DataError(f"sequence {sequence.id} has no array {lost[0]!r}", where=data.artifact.root)
        moves &= "ego_motion" in layout
        cut_in_T, near_T = (arrays[name] for name in RARE_ARRAYS)
        rare.append(np.where(near_T, 1, np.where(cut_in_T, 0, 2)).astype(np.uint8))
    return _Glance(np.concatenate(rare), moves)


def _planes(data: Dataset, sequences: Sequence[SequenceInfo], moves: bool, budget: int | None) -> BlockRows:
    """The planes of all frames, decoded when they are read."""
    members = runs(sequences)
    byte = np.dtype(np.uint8)
    layout: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        "sensors": (byte, (len(SENSOR_PLANES), PLANE_BYTES)), **dict.fromkeys(LABEL_PLANES, (byte, (PLANE_BYTES,))),
        **({"ego_motion": (np.dtype(np.float32), (3,))} if moves else {}),
    }
    frames_K = np.array([sum(sequence.frames for sequence in block) for block in members])
    per_frame = sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in layout.values())

    def load(number: int) -> Arrays:
        found = data.joined(members[number], [*SENSOR_PLANES, *(name for name in layout if name != "sensors")])
        return {"sensors": np.stack([found.pop(name) for name in SENSOR_PLANES], axis=1), **found}

    return BlockRows(np.cumsum(frames_K) - frames_K, layout, frames_K * per_frame, load, budget)


def _numbered(names: Sequence[str]) -> Array:
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], np.int64)


def _scene(sequence: SequenceInfo, data: Dataset) -> int:
    scenario = sequence.metadata.get("scenario")
    if scenario in OFF_ROAD:
        return -1  # of no class: losses and metrics leave it out
    if scenario not in SCENES:
        raise DataError(f"sequence {sequence.id} has an unknown scenario", where=data.artifact.root,
                        expected=", ".join(SCENES), found=scenario)
    return SCENES.index(scenario)


def _slices(sequences: Sequence[SequenceInfo], number_N: Array, rare_N: Array) -> Labels:
    """Labels of each sample: scenario, weather and rare case (`cut-in`, `near-collision` or `none`)."""
    axes = {axis: np.unique([str(s.metadata[axis]) for s in sequences], return_inverse=True)
            for axis in ("scenario", "weather")}
    return Labels({**{axis: (names, codes.ravel()[number_N]) for axis, (names, codes) in axes.items()},
                   "rare": (np.array(RARE), rare_N)})
