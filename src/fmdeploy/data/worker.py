"""Records one simulation after another: the process that `data record` starts several of.

Protocol: one JSON job a line on stdin, one JSON reply a line on stdout. The process ends with its stdin, so it never
outlives a killed parent by more than one simulation. It imports neither torch nor anything else that is heavy.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fmdeploy.arrays import Arrays
from fmdeploy.data.highway import Scenario
from fmdeploy.data.labels import rare_cases
from fmdeploy.data.motion import ego_motion
from fmdeploy.data.rigs import DEFAULT_RIG, RigName
from fmdeploy.data.scenes import Profile, simulate
from fmdeploy.data.sensors import observe
from fmdeploy.data.weather import Weather
from fmdeploy.data.writer import npz_bytes


@dataclass(frozen=True)
class Job:
    """One simulation to record; equal jobs give equal files."""

    number: int
    scenario: Scenario
    seed: int
    weather: Weather
    frames: int
    egos: int
    profile: Profile = "road"
    rig: RigName = DEFAULT_RIG

    def to_line(self, folder: Path) -> str:
        """The job as a line of the protocol, to be written into `folder`."""
        return json.dumps({**asdict(self), "folder": str(folder)}) + "\n"


def record_sequences(job: Job) -> list[Arrays]:
    """Simulate the job's scene; one dictionary of arrays with a leading time axis (T, ...) an ego.

    Planes are uint8 (T, 512): the 64 x 64 cells packed eight to a byte, row by row (`numpy.packbits`).
    """
    scene = simulate(job.scenario, job.seed, frames=job.frames, egos=job.egos, profile=job.profile)
    return [_sequence(scene, ego, job, rank) for rank, ego in enumerate(scene.egos)]


def _sequence(scene: Any, ego: int, job: Job, rank: int) -> Arrays:
    planes = observe(scene, ego, job.weather, np.random.default_rng([job.seed, 2, rank]), job.rig)
    packed = {name: np.packbits(plane.reshape(job.frames, -1), axis=1) for name, plane in planes.items()}
    return {**packed, **rare_cases(scene, ego), "ego_motion": ego_motion(scene, ego)}


def sequence_path(folder: Path, number: int, rank: int) -> Path:
    """Where the sequence of ego `rank` of simulation `number` is kept until the dataset is put together."""
    return folder / f"{number:06d}-{rank}.npz"


def done_path(folder: Path, number: int) -> Path:
    """Exists when all sequences of a simulation are there; holds how many they are."""
    return folder / f"{number:06d}.done"


def record_job(job: Job, folder: Path) -> int:
    """Record one simulation into `folder` so that a kill at any time leaves it whole or absent; frames recorded."""
    sequences = record_sequences(job)
    for rank, arrays in enumerate(sequences):
        _write(sequence_path(folder, job.number, rank), npz_bytes(arrays))
    _write(done_path(folder, job.number), str(len(sequences)).encode())
    return len(sequences) * job.frames


def _write(path: Path, payload: bytes) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(payload)
    os.replace(part, path)


def main() -> None:
    """Serve jobs until stdin ends. Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin:
        fields = json.loads(line)
        folder = Path(fields.pop("folder"))
        try:
            reply: dict[str, Any] = {"frames": record_job(Job(**fields), folder)}
        except OSError as error:
            reply = {"errno": error.errno, "error": str(error)}
        except Exception as error:  # a bug here must end the recording with its cause, not with a silent worker
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
