"""The one place that knows highway-env: importing it, opening its scenes, reading its lanes.

highway-env (https://github.com/Farama-Foundation/HighwayEnv, MIT) is a driving simulator. Quirks of 1.12.1 end here:

- importing it draws in pygame, which greets on stdout, and gymnasium, which warns about its own deprecations;
- it logs a warning for each driver that leaves its planned route, which ours may do;
- building an environment resets it without a seed, so environments are built once a process and reset with a seed;
- the intersection overwrites the IDM constants *of the class*, so that every later scene would drive differently
  (and a dataset would depend on which process recorded which scene): they are put back after each scene;
- the parking lot has stalls and no aisles, a mark where to park and walls 70 m long: see lot.py;
- the racetrack's ego is a plain `Vehicle` without a target lane, from which `IDMVehicle.create_from` raises.
"""

# N vehicles, P points; world frame: x east, y south (as drawn), headings clockwise from x, metres and radians

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.optional import require

Scenario = Literal[
    "highway", "merge", "roundabout", "intersection", "exit", "two-way", "u-turn", "racetrack", "parking",
]
SCENARIOS: tuple[Scenario, ...] = (
    "highway", "merge", "roundabout", "intersection", "exit", "two-way", "u-turn", "racetrack",
)
"""Scenarios on the road: those that are recorded unless others are asked for."""
OFF_ROAD: tuple[Scenario, ...] = ("parking",)
_ENVIRONMENTS: dict[Scenario, str] = {
    "highway": "highway_env:HighwayEnv",
    "merge": "merge_env:MergeEnv",
    "roundabout": "roundabout_env:RoundaboutEnv",
    "intersection": "intersection_env:IntersectionEnv",
    "exit": "exit_env:ExitEnv",
    "two-way": "two_way_env:TwoWayEnv",
    "u-turn": "u_turn_env:UTurnEnv",
    "racetrack": "racetrack_env:RacetrackEnv",
    "parking": "parking_env:ParkingEnv",
}
_OPTIONS: dict[str, Any] = {
    "observation": {"type": "Kinematics", "vehicles_count": 1, "normalize": False},  # the cheapest: nobody looks at it
    "simulation_frequency": 10,
    "neighbour_vehicles_connected_lanes": True,  # see across lane segments; without it cars run into each other there
}
_IDM_CONSTANTS = ("DISTANCE_WANTED", "COMFORT_ACC_MAX", "COMFORT_ACC_MIN")


@cache
def load(module: str) -> Any:
    """Import a module of highway-env in silence, once.

    Raises:
        MissingDependencyError: highway-env is not installed.
    """
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    logging.getLogger("highway_env").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        require("highway_env")
        return require(module)


@cache
def _environment(scenario: Scenario) -> Any:
    module, _, name = _ENVIRONMENTS[scenario].partition(":")
    kind = getattr(load(f"highway_env.envs.{module}"), name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind({**_OPTIONS, **({"add_walls": False} if scenario == "parking" else {})})


def version() -> str:
    """Version of highway-env, which is the version of its maps."""
    return str(load("highway_env").__version__)


@contextmanager
def open_road(scenario: Scenario, seed: int) -> Iterator[tuple[Any, Any]]:
    """The road of a freshly seeded scene with its vehicles, and the vehicle that highway-env calls ego.

    Every vehicle on the road is an `IDMVehicle`. highway-env's class constants are restored on leaving.
    """
    idm = load("highway_env.vehicle.behavior").IDMVehicle
    saved = {name: getattr(idm, name) for name in _IDM_CONSTANTS}
    try:
        environment = _environment(scenario)  # building one resets it, which already changes the constants
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            environment.reset(seed=seed)
        road, stock_ego = environment.road, environment.vehicle
        ego = as_driver(stock_ego)
        road.vehicles = [ego if vehicle is stock_ego else vehicle for vehicle in road.vehicles]
        yield road, ego
    finally:
        for name, value in saved.items():
            setattr(idm, name, value)


def as_driver(vehicle: Any) -> Any:
    """An `IDMVehicle` in the place of `vehicle`: it drives by itself, without an observation or an action."""
    idm = load("highway_env.vehicle.behavior").IDMVehicle
    return idm(
        vehicle.road, vehicle.position, heading=vehicle.heading, speed=vehicle.speed,
        target_lane_index=getattr(vehicle, "target_lane_index", None),
        target_speed=getattr(vehicle, "target_speed", None), route=getattr(vehicle, "route", None),
    )


def new_driver(road: Any, lane_index: tuple[str, str, int], along: float, speed: float) -> Any:
    """An `IDMVehicle` at the centre of a lane, `along` metres from its start, at `speed` m/s. Not yet on the road."""
    return load("highway_env.vehicle.behavior").IDMVehicle.make_on_lane(road, lane_index, along, speed=speed)


def new_parked(road: Any, position: Array, heading: float, length: float, width: float) -> Any:
    """A vehicle that stands where it is, as one of highway-env's obstacles. Not yet on the road."""
    parked = load("highway_env.vehicle.objects").Obstacle(road, position, heading=heading)
    parked.LENGTH, parked.WIDTH = length, width
    parked.diagonal = float(np.hypot(length, width))
    return parked


def add_straight(road: Any, start: str, end: str, points: tuple[tuple[float, float], tuple[float, float]],
                 width: float) -> None:
    """Add an unmarked straight lane from node `start` to node `end`, between two world points, `width` metres wide."""
    module = load("highway_env.road.lane")
    none = (module.LineType.NONE, module.LineType.NONE)
    road.network.add_lane(start, end, module.StraightLane(*points, width=width, line_types=none))


@dataclass(frozen=True)
class Lane:
    """Geometry of one lane: a straight (perhaps with a sine across) or an arc."""

    index: tuple[str, str, int]
    length: float
    width: float
    lines: tuple[int, int]
    """Marking at lateral -width/2 and +width/2: 0 none, 1 dashed, 2 and 3 solid (highway-env's `LineType`)."""
    start: tuple[float, float]
    """Start of a straight, centre of an arc."""
    angle: float
    """Heading of a straight; phase at the start of an arc."""
    radius: float = 0.0
    turn: int = 0
    """0 straight, +1 clockwise, -1 counter-clockwise."""
    sine: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Amplitude (m), pulsation (rad/m) and phase (rad) of the centre line across a straight."""

    def points(self, along_P: Array, lateral_P: Array) -> Array:
        """World positions (P, 2) of lane coordinates."""
        if self.turn:
            phase_P = self.turn * along_P / self.radius + self.angle
            reach_P = self.radius - lateral_P * self.turn
            return np.stack([reach_P * np.cos(phase_P), reach_P * np.sin(phase_P)], -1) + self.start
        amplitude, pulsation, phase = self.sine
        across_P = lateral_P + amplitude * np.sin(pulsation * along_P + phase)
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        return np.stack([along_P * cos - across_P * sin, along_P * sin + across_P * cos], -1) + self.start


def lanes_of(road: Any) -> tuple[Lane, ...]:
    """All lanes of a road, in highway-env's own order."""
    return tuple(_lane(index, lane) for index, lane in road.network.lanes_dict().items())


def _lane(index: tuple[str, str, int], lane: Any) -> Lane:
    arc = hasattr(lane, "center")
    sine = (float(lane.amplitude), float(lane.pulsation), float(lane.phase)) if hasattr(lane, "amplitude") else None
    return Lane(
        index, float(lane.length), float(lane.width_at(0.0)), (int(lane.line_types[0]), int(lane.line_types[1])),
        start=_pair(lane.center if arc else lane.start), angle=float(lane.start_phase if arc else lane.heading),
        radius=float(lane.radius) if arc else 0.0, turn=int(lane.direction) if arc else 0,
        sine=sine or (0.0, 0.0, 0.0),
    )


def _pair(point: Any) -> tuple[float, float]:
    return float(point[0]), float(point[1])
