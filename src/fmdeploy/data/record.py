"""`data record`: driving scenes from highway-env as a DATASET, in parallel, the same bytes for the same seed.

Every simulation has a seed of its own; scenario, weather, date and split follow from its number. Nothing depends on
how many processes record, or on how often the recording was interrupted.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from fmdeploy.arrays import Arrays
from fmdeploy.artifact import Artifact
from fmdeploy.command import command
from fmdeploy.config import OutputPath, RunOnly, StageConfig
from fmdeploy.data import highway
from fmdeploy.data.dealing import deal
from fmdeploy.data.format import SPLITS
from fmdeploy.data.highway import SCENARIOS, Scenario
from fmdeploy.data.rigs import DEFAULT_RIG, RigName
from fmdeploy.data.scenes import Profile
from fmdeploy.data.weather import WEATHERS, Weather
from fmdeploy.data.worker import Job, done_path, sequence_path
from fmdeploy.data.workers import run_jobs, usable_cores
from fmdeploy.data.writer import DatasetWriter
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import ConfigError, DataError
from fmdeploy.manifest import Kind
from fmdeploy.progress import progress

SEEDS_PER_RECORDING = 100_000
FIRST_DAY, DAYS = datetime.date(2026, 3, 2), 10
MAP_DAY = "2026-02-02"


class RecordConfig(StageConfig):
    """What to record."""

    out: OutputPath = Field(description="Folder of the DATASET")
    simulations: int = Field(default=240, ge=1, lt=SEEDS_PER_RECORDING, description="Simulations, over all scenarios")
    egos: int = Field(default=2, ge=1, le=8, description="Vehicles to look from in each simulation: its sequences")
    frames: int = Field(default=40, ge=2, le=1000, description="Frames of a sequence, 5 a second")
    seed: int = Field(default=0, ge=0, lt=2**40, description="Equal seeds give equal datasets, others disjoint ones")
    scenarios: tuple[Scenario, ...] = Field(default=SCENARIOS, min_length=1, description="Which scenarios")
    weathers: tuple[Weather, ...] = Field(default=WEATHERS, min_length=1, description="Which weathers")
    profile: Profile = Field(default="road", description="airside: slow, close, with parked vehicles all around")
    rig: RigName = Field(default=DEFAULT_RIG, description="Sensors; bumper-1: fewer beams, shorter and narrower sight")
    val: float = Field(default=0.2, ge=0, lt=1, description="Share of simulations for validation")
    test: float = Field(default=0.2, ge=0, lt=1, description="Share of simulations for test")
    workers: Annotated[int, RunOnly()] = Field(default=0, ge=0, description="Processes; 0 means one for each core")

    @model_validator(mode="after")
    def _agree(self) -> RecordConfig:
        if self.val + self.test >= 1:
            raise ValueError(f"val + test must leave something to train on, found {self.val} + {self.test}")
        for name, values in (("scenarios", self.scenarios), ("weathers", self.weathers)):
            if len(set(values)) != len(values):
                raise ValueError(f"{name} repeat: {', '.join(values)}")
        return self

    def resolved(self) -> dict[str, Any]:
        """Without profile and rig where they are the usual ones, so that old recordings keep their digests."""
        usual = {"profile": "road", "rig": DEFAULT_RIG}
        return {name: value for name, value in super().resolved().items() if usual.get(name) != value}


@command(RecordConfig)
def record(config: RecordConfig) -> Artifact:
    """Record driving scenes from highway-env: both sensors, labels and rare cases of every frame.

    Raises:
        ConfigError: too few simulations for the splits that were asked for.
        MissingDependencyError: highway-env is not installed.
    """
    jobs = plan(config)
    splits = assign(config, jobs)
    return produce(config.out, Kind.DATASET, stage="data record", config=config, inputs={}, resumable=True,
                   build=lambda draft: _build(draft, config, jobs, splits))


def plan(config: RecordConfig) -> list[Job]:
    """All simulations, scenario after scenario; weathers take turns within each."""
    shares = [len(part) for part in np.array_split(np.arange(config.simulations), len(config.scenarios))]
    jobs: list[Job] = []
    for rank, (scenario, share) in enumerate(zip(config.scenarios, shares, strict=True)):
        for k in range(share):
            jobs.append(Job(
                number=len(jobs), scenario=scenario, seed=config.seed * SEEDS_PER_RECORDING + len(jobs),
                weather=config.weathers[(k + rank) % len(config.weathers)], frames=config.frames, egos=config.egos,
                profile=config.profile, rig=config.rig,
            ))
    return jobs


def assign(config: RecordConfig, jobs: Sequence[Job]) -> list[str]:
    """Split of each simulation; see `deal`.

    Raises:
        ConfigError: a split that was asked for stays empty.
    """
    wanted = np.array([1 - config.val - config.test, config.val, config.test])
    chosen = [SPLITS[number] for number in deal(jobs, wanted)]
    if empty := [name for name, share in zip(SPLITS, wanted, strict=True) if share > 0 and name not in chosen]:
        raise ConfigError(f"{len(jobs)} simulations are too few: {empty[0]} would be empty", where="simulations")
    return chosen


def metadata_of(job: Job, ego: int) -> dict[str, Any]:
    """Metadata of one sequence. The date is invented from the simulation's number, so that one can split by it."""
    return {
        "scenario": job.scenario, "place": place_of(job), "seed": job.seed, "ego": ego, "weather": job.weather,
        "simulation": f"{job.scenario}-{job.seed}", "sensor_rig": job.rig,
        "map_version": map_version(job), "map_date": MAP_DAY,
        "route": f"{job.scenario}-{job.seed}",  # every simulation builds its own stretch of road
        "date": (FIRST_DAY + datetime.timedelta(days=job.number % DAYS)).isoformat(), "frames_per_second": 5,
        "recording": sequence_name(job, ego), "first_frame": 0,
    }


def place_of(job: Job) -> str:
    """Where it is driven: the scenario's road, or its like on the apron, which has parked vehicles along it."""
    return job.scenario if job.profile == "road" else f"{job.profile}-{job.scenario}"


def map_version(job: Job) -> str:
    """Version of the road network: highway-env's own, but for the lot, which has our aisles."""
    return f"highway-env-{highway.version()}" + ("+aisles" if job.scenario in highway.OFF_ROAD else "")


def sequence_name(job: Job, ego: int) -> str:
    """Id of one sequence, `<scenario>-<seed>-<ego>`."""
    return f"{job.scenario}-{job.seed:09d}-{ego}"


def _build(draft: Draft, config: RecordConfig, jobs: Sequence[Job], splits: Sequence[str]) -> None:
    folder = draft.path("work/simulations")
    missing = [job for job in jobs if not done_path(folder, job.number).is_file()]
    if draft.is_main:
        with progress("record", total=len(jobs) * config.egos * config.frames) as bar:
            for frames in run_jobs(missing, folder, workers=config.workers or usable_cores()):
                bar.advance(frames)
        _assemble(draft, jobs, splits, folder)


def _assemble(draft: Draft, jobs: Sequence[Job], splits: Sequence[str], folder: Path) -> None:
    """Put the sequences of all simulations into shards, in the order of their numbers."""
    writer = DatasetWriter(draft)
    members: dict[str, list[str]] = {name: [] for name in SPLITS}
    for job, split in zip(jobs, splits, strict=True):
        for ego in range(int(done_path(folder, job.number).read_text())):
            name = sequence_name(job, ego)
            writer.add(name, _load(sequence_path(folder, job.number, ego)), metadata_of(job, ego))
            members[split].append(name)
    writer.close({name: members[name] for name in SPLITS})


def _load(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as npz:
            return {key: npz[key] for key in npz.files}
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot be read: {error}", where=path,
                        fix="Delete it and run the same command again") from error
