"""Samples of `bev-occupancy`: four past frames of both sensors, occupancy now and later, all bit-packed in memory.

A sample is frame t of a sequence, t = 3, 5, ... as far as the last horizon reaches (3..31 of 40 frames). Future labels
are simply later frames: what the ego will have around it, in its own frame at that later instant.
"""

# N samples, B batch, F frames of all sequences, K = 5 sensor planes, P = 64 * 64 cells

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fmdeploy.data.format import Dataset
from fmdeploy.data.sequence import SequenceInfo
from fmdeploy.errors import DataError
from fmdeploy.task import Array, Arrays

GRID = 64
LIDAR_PLANES = ("lidar_hit", "lidar_free")
CAMERA_PLANES = ("camera_vehicle", "camera_drivable", "camera_line")
LABEL_PLANES = ("occupancy", "drivable")
PAST = 4
HORIZONS = (0, 2, 4, 8)
"""Frames ahead: 0, 0.4, 0.8 and 1.6 s at 5 frames a second."""
STRIDE = 2
SCENES = ("highway", "merge", "roundabout", "intersection", "exit", "two-way", "u-turn", "racetrack")
"""Classes of the output `scene`, in order."""


@dataclass(frozen=True)
class BevSamples:
    """Samples of one split; see `task.Samples`. Planes stay packed, eight cells a byte."""

    ids: tuple[str, ...]
    groups: Array
    """int64 (N,): samples of one simulation share a number."""
    slices: dict[str, Array]
    sensors_FKP8: Array
    """uint8 (F, 5, 512): planes in the order of LIDAR_PLANES, CAMERA_PLANES."""
    labels_F2P8: Array
    """uint8 (F, 2, 512): occupancy, drivable."""
    frame_N: Array
    """int (N,): row of each sample's present frame."""
    scene_N: Array
    """int64 (N,): its class in SCENES."""
    sequence_N: Array = field(repr=False)
    """int (N,): number of its sequence within the split."""
    motion_F3: Array | None = field(default=None, repr=False)
    """float32 (F, 3): see `data.motion.ego_motion`; None where the dataset has none."""

    @classmethod
    def of(cls, data: Dataset, split: str) -> BevSamples:
        """Load the samples of `split` (train, val, test or all).

        Raises:
            DataError: the split is empty, or the dataset is not one of driving scenes.
        """
        sequences = data.split(split)
        arrays = [_checked(data, sequence) for sequence in sequences]
        first = np.cumsum([0] + [sequence.frames for sequence in sequences])[:-1]
        frames = [np.arange(PAST - 1, sequence.frames - HORIZONS[-1], STRIDE) for sequence in sequences]
        number_N = np.repeat(np.arange(len(sequences)), [len(f) for f in frames])
        frame_N = np.concatenate([start + f for start, f in zip(first, frames, strict=True)])
        ids = tuple(f"{s.id}/{t}" for s, f in zip(sequences, frames, strict=True) for t in f)
        if not ids:
            raise DataError(f"the sequences of {split!r} are too short", where=data.artifact.root,
                            expected=f"at least {PAST + HORIZONS[-1]} frames")
        return cls(
            ids=ids, groups=_numbered([s.group for s in sequences])[number_N],
            slices=_slices(sequences, arrays, number_N, frame_N),
            sensors_FKP8=_stack(arrays, (*LIDAR_PLANES, *CAMERA_PLANES)), labels_F2P8=_stack(arrays, LABEL_PLANES),
            frame_N=frame_N, scene_N=np.array([_scene(s, data) for s in sequences], np.int64)[number_N],
            sequence_N=number_N, motion_F3=_motion(arrays),
        )

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
        now_B1P8 = self.labels_F2P8[frame_B, 1][:, None]
        bev_BHP8 = np.concatenate([self.labels_F2P8[later_BH, 0], now_B1P8], axis=1)
        lidar, camera = _floats(self.sensors_FKP8[past_BT], (len(LIDAR_PLANES), len(CAMERA_PLANES)))
        return {"lidar": lidar, "camera": camera}, {"bev": _cells(bev_BHP8), "scene": self.scene_N[index]}


    def frames(self, index: Array, offsets: Sequence[int]) -> Array:
        """Sensor planes uint8 (B, len(offsets), 5, 64, 64) of other frames of the samples `index` (B,).

        Args:
            index: Numbers of the samples.
            offsets: Frames from the present one, -3 .. 8: always inside the sample's sequence.
        """
        packed_BTKP8 = self.sensors_FKP8[self._rows(index, offsets)]
        return _cells(packed_BTKP8.reshape(len(index), -1, packed_BTKP8.shape[-1])).reshape(
            len(index), len(offsets), len(LIDAR_PLANES) + len(CAMERA_PLANES), GRID, GRID)

    def occupancy(self, index: Array, offsets: Sequence[int]) -> Array:
        """Labelled vehicle occupancy uint8 (B, len(offsets), 64, 64) at other frames; offsets as in `frames`."""
        return _cells(self.labels_F2P8[self._rows(index, offsets), 0])

    def motion(self, index: Array, offsets: Sequence[int]) -> Array:
        """How the ego came to other frames, float32 (B, len(offsets), 3); offsets as in `frames`.

        Raises:
            DataError: the dataset has no `ego_motion`.
        """
        if self.motion_F3 is None:
            raise DataError("the dataset has no array 'ego_motion'", fix="Record it again: fmdeploy data record")
        return np.asarray(self.motion_F3[self._rows(index, offsets)])

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


def _checked(data: Dataset, sequence: SequenceInfo) -> Arrays:
    arrays = data.arrays(sequence)
    for name in (*LIDAR_PLANES, *CAMERA_PLANES, *LABEL_PLANES):
        if name not in arrays or arrays[name].dtype != np.uint8 or arrays[name].shape[1:] != (GRID * GRID // 8,):
            found = f"{arrays[name].dtype}{list(arrays[name].shape)}" if name in arrays else "none"
            raise DataError(f"sequence {sequence.id} has no usable plane {name!r}", where=data.artifact.root,
                            expected="uint8[frames, 512]", found=found, fix="Record one with: fmdeploy data record")
    return arrays


def _stack(arrays: Sequence[Arrays], names: Sequence[str]) -> Array:
    return np.stack([np.concatenate([part[name] for part in arrays]) for name in names], axis=1)


def _motion(arrays: Sequence[Arrays]) -> Array | None:
    if any("ego_motion" not in part for part in arrays):
        return None
    return np.concatenate([part["ego_motion"] for part in arrays])


def _numbered(names: Sequence[str]) -> Array:
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], np.int64)


def _scene(sequence: SequenceInfo, data: Dataset) -> int:
    scenario = sequence.metadata.get("scenario")
    if scenario not in SCENES:
        raise DataError(f"sequence {sequence.id} has an unknown scenario", where=data.artifact.root,
                        expected=", ".join(SCENES), found=scenario)
    return SCENES.index(scenario)


def _slices(
    sequences: Sequence[SequenceInfo], arrays: Sequence[Arrays], number_N: Array, frame_N: Array
) -> dict[str, Array]:
    """Labels of each sample: scenario, weather and rare case (`cut-in`, `near-collision` or `none`)."""
    cut_in_N = np.concatenate([part["rare_cut_in"] for part in arrays])[frame_N]
    near_N = np.concatenate([part["rare_near_collision"] for part in arrays])[frame_N]
    return {
        "scenario": np.array([str(s.metadata["scenario"]) for s in sequences])[number_N],
        "weather": np.array([str(s.metadata["weather"]) for s in sequences])[number_N],
        "rare": np.where(near_N, "near-collision", np.where(cut_in_N, "cut-in", "none")),
    }
