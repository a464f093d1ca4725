"""Driving scenes: busy traffic around an ego, simulated by highway-env, kept as plain arrays.

Stock scenes are nearly empty around the ego (one to three vehicles within 32 m), so it is put where the scenario
happens and drivers are added near it. Every vehicle drives by itself; the egos are chosen after the simulation.
"""

# T frames, N vehicles and obstacles, P points

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.data.highway import Lane, Scenario, lanes_of, new_driver, open_road
from fmdeploy.data.lot import AISLE_M, AISLES, STALLS, park, pave
from fmdeploy.data.traffic import Traffic

FRAME_S = 0.2
STEPS_PER_FRAME = 2
KEEP_M = 100.0
"""Vehicles that start farther from the ego than this do not come near it in 8 s; they only cost time."""
CROWD_M = 70.0
PUSHY = 0.25
"""Share of drivers that keep short gaps and change lanes into them: stock drivers never cut in."""
MOVED_M, MOVED_SLOW_M = 5.0, 1.5
"""An ego moves at least this far; the second is for slow scenes."""
Profile = Literal["road", "airside"]
"""airside: everybody at walking to cycling speed, half as many drivers again, closer together, parked vehicles."""
X, Y, HEADING, SPEED, LENGTH, WIDTH = range(6)


class Setting(NamedTuple):
    """How one scenario is filled."""

    lanes: tuple[tuple[str, str], ...]
    """Roads on which the ego may start; () leaves it where highway-env puts it."""
    along: tuple[float, float]
    """Where on them, in metres."""
    speed: tuple[float, float]
    """m/s, of the ego and of added drivers."""
    crowd: tuple[int, int]
    """How many drivers are added (at most; lanes may be full)."""
    closed: tuple[tuple[str, str], ...] = ()
    """Roads on which nobody is added."""
    goals: tuple[str, ...] = ()
    lane_changes: bool = True
    gap: tuple[float, float] = (9.0, 15.0)
    """Free length around an added driver, in metres; drawn once a scene."""
    parked: tuple[int, int] = (0, 0)
    """How many vehicles stand around (at most)."""
    slow: bool = False
    """Everybody keeps to `speed` and drives up close."""


SETTINGS: dict[Scenario, Setting] = {
    "highway": Setting((), (0, 0), (19, 28), (10, 18)),
    "merge": Setting((("a", "b"), ("a", "b"), ("j", "k")), (90, 150), (14, 22), (9, 16)),
    "roundabout": Setting((("ser", "ses"),), (80, 125), (7, 12), (7, 13), goals=("exr", "sxr", "nxr", "wxr")),
    "intersection": Setting((), (0, 0), (6, 10), (7, 12), goals=("o0", "o1", "o2", "o3"),
                            closed=tuple((f"ir{i}", f"il{j}") for i in range(4) for j in range(4))),
    "exit": Setting((("0", "1"),), (230, 340), (12, 24), (10, 18), goals=("3",)),
    "two-way": Setting((("a", "b"),), (200, 400), (15, 24), (10, 14), lane_changes=False),
    "u-turn": Setting((("a", "b"),), (30, 105), (6, 14), (7, 13), goals=("d",)),
    "racetrack": Setting((), (0, 0), (5, 9), (7, 12)),
    "parking": Setting(AISLES, (AISLE_M / 2 - 25, AISLE_M / 2 + 5), (1, 4), (8, 14), closed=STALLS, gap=(7.0, 9.0),
                       parked=(14, 24), slow=True),
}
AIRSIDE: dict[str, Any] = {"speed": (1, 4), "gap": (7.0, 9.0), "slow": True}
AIRSIDE_PARKED = (8, 16)


def setting_of(scenario: Scenario, profile: Profile = "road") -> Setting:
    """How a scenario is filled under a profile."""
    setting = SETTINGS[scenario]
    if profile == "road":
        return setting
    (fewest, most), standing = setting.crowd, max(setting.parked, AIRSIDE_PARKED)
    return setting._replace(**AIRSIDE, crowd=(fewest * 3 // 2, most * 3 // 2), parked=standing)


@dataclass(frozen=True)
class Scene:
    """One simulation: everything that sensors and labels are computed from."""

    scenario: Scenario
    seed: int
    lanes: tuple[Lane, ...]
    box_TN6: Array
    """float64 (T, N, 6): x, y (m), heading (rad), speed (m/s), length, width (m); NaN when absent. Last: obstacles."""
    lane_TN: Array
    """int (T, N): number of the lane it is on; -1 when absent."""
    along_TN: Array
    """float64 (T, N): metres along that lane."""
    egos: tuple[int, ...]
    """Columns that stay on the road, uncrashed, for the whole scene; highway-env's own ego first where it does."""


def simulate(
    scenario: Scenario, seed: int, *, frames: int = 40, egos: int = 2, profile: Profile = "road"
) -> Scene:
    """Simulate one scene of `frames` frames at 5 Hz and choose up to `egos` vehicles to look from.

    Equal arguments give equal arrays, whatever was simulated before.
    """
    rng, setting = np.random.default_rng([seed, 1]), setting_of(scenario, profile)
    with open_road(scenario, seed) as (road, ego):
        if scenario == "parking":
            pave(road)
        ego = _place(road, ego, setting, scenario, rng)
        _crowd(road, ego, setting, scenario, rng)
        _vary_sizes(road, rng)
        if setting.slow:
            _slow_down(road, setting, rng)
        if setting.parked[1]:
            park(road, int(rng.integers(*setting.parked, endpoint=True)), ego.position, CROWD_M, rng)
        track = _Track(road, frames)
        traffic = Traffic(road)
        for frame in range(frames):
            track.take(frame, traffic)
            _remove_leavers(road, traffic)
            for _ in range(STEPS_PER_FRAME if frame + 1 < frames else 0):
                traffic.step(FRAME_S / STEPS_PER_FRAME)
        return Scene(scenario, seed, traffic.table.lanes, track.box_TN6, track.lane_TN, track.along_TN,
                     _choose_egos(track, track.vehicles.index(ego), egos,
                                  MOVED_SLOW_M if setting.slow else MOVED_M, rng))


class _Track:
    """Writes down the road, frame by frame, one column a thing."""

    def __init__(self, road: Any, frames: int) -> None:
        self.vehicles = list(road.vehicles)
        self._column = {id(thing): i for i, thing in enumerate(self.vehicles + road.objects)}
        self.box_TN6 = np.full((frames, len(self._column), 6), np.nan)
        self.lane_TN = np.full((frames, len(self._column)), -1)
        self.along_TN = np.full((frames, len(self._column)), np.nan)
        self.sound_N = np.array([True] * len(self.vehicles) + [False] * len(road.objects))

    def take(self, frame: int, traffic: Traffic) -> None:
        """Note all things of this frame, and which vehicles are no longer fit to be an ego."""
        road = traffic.road
        things = road.vehicles + road.objects
        columns = np.array([self._column[id(thing)] for thing in things])
        self.box_TN6[frame, columns] = [
            (*thing.position, thing.heading, thing.speed, thing.LENGTH, thing.WIDTH) for thing in things
        ]
        rows = np.arange(len(things))
        self.lane_TN[frame, columns] = traffic.lane_N
        self.along_TN[frame, columns] = traffic.along_NL[rows, traffic.lane_N]
        inside = np.any(traffic.table.holds(traffic.along_NL, traffic.lateral_NL, margin=0.5), axis=1)
        fit_N = np.zeros_like(self.sound_N)
        fit_N[columns] = inside & ~np.array([thing.crashed for thing in things])
        self.sound_N &= fit_N


def _place(road: Any, ego: Any, setting: Setting, scenario: Scenario, rng: np.random.Generator) -> Any:
    """Move the ego to where its scenario happens and let it go; drop the vehicles that are too far to matter."""
    if setting.lanes:
        start, end = setting.lanes[rng.integers(len(setting.lanes))]
        rank = 1 if scenario == "two-way" else int(rng.integers(len(road.network.graph[start][end])))
        moved = new_driver(road, (start, end, rank), rng.uniform(*setting.along), rng.uniform(*setting.speed))
        road.vehicles = [moved, *(v for v in road.vehicles if v is not ego and not _touches(moved, v, 9.0))]
        ego = moved
    road.vehicles = [v for v in road.vehicles if v is ego or np.hypot(*(v.position - ego.position)) < KEEP_M]
    _instruct(ego, setting, scenario, rng)
    return ego


def _crowd(road: Any, ego: Any, setting: Setting, scenario: Scenario, rng: np.random.Generator) -> None:
    """Add drivers on the lanes around the ego, as many as fit with a gap that differs from scene to scene."""
    wanted, gap = rng.integers(*setting.crowd, endpoint=True), rng.uniform(*setting.gap)
    places = [(lane, s) for lane in lanes_of(road) if _is_open(lane, setting, scenario) for s in _near(lane, ego)]
    for number in rng.permutation(len(places)):
        lane, along = places[number]
        if wanted == 0:
            return
        driver = new_driver(road, lane.index, along + rng.uniform(-0.5, 0.5), rng.uniform(*setting.speed))
        if any(_touches(driver, other, gap) for other in [*road.vehicles, *road.objects]):
            continue
        _instruct(driver, setting, scenario, rng)
        road.vehicles.append(driver)
        wanted -= 1


def _is_open(lane: Lane, setting: Setting, scenario: Scenario) -> bool:
    if scenario == "two-way" and lane.index == ("a", "b", 0):
        return False  # the oncoming lane under another name
    return lane.index[:2] not in setting.closed


def _near(lane: Lane, ego: Any) -> Array:
    """Places (m along the lane, one a metre) within CROWD_M of the ego."""
    middle = 0.0
    if lane.length > 2 * KEEP_M and not lane.turn:
        cos, sin = np.cos(lane.angle), np.sin(lane.angle)
        middle = float((ego.position[0] - lane.start[0]) * cos + (ego.position[1] - lane.start[1]) * sin)
    along_P = np.arange(max(2.0, middle - KEEP_M), min(lane.length - 2.0, middle + 2 * KEEP_M))
    offset_P2 = lane.points(along_P, np.zeros_like(along_P)) - ego.position
    return np.asarray(along_P[np.hypot(offset_P2[:, 0], offset_P2[:, 1]) < CROWD_M])


def _touches(one: Any, other: Any, gap: float) -> bool:
    """Whether `other` is nearer than `gap` metres along, and a lane's width across, the heading of `one`."""
    offset = other.position - one.position
    cos, sin = np.cos(one.heading), np.sin(one.heading)
    return bool(abs(offset[0] * cos + offset[1] * sin) < gap and abs(offset[1] * cos - offset[0] * sin) < 3.0)


def _instruct(driver: Any, setting: Setting, scenario: Scenario, rng: np.random.Generator) -> None:
    """Give a driver its destination and its habits."""
    driver.enable_lane_change = setting.lane_changes
    driver.DELTA = rng.uniform(*driver.DELTA_RANGE)
    if rng.uniform() < PUSHY:
        driver.TIME_WANTED, driver.DISTANCE_WANTED = 0.7, driver.LENGTH + 2.0
        driver.LANE_CHANGE_MAX_BRAKING_IMPOSED, driver.LANE_CHANGE_MIN_ACC_GAIN = 9.0, 0.0
        driver.target_speed *= 1.15
    if scenario == "exit":
        leaves = driver.lane_index == ("0", "1", 5) and rng.uniform() < 0.5
        driver.plan_route_to("exit" if leaves or driver.lane_index[1] == "exit" else "3")
        if leaves:
            return
    elif setting.goals:
        goals = [goal for goal in setting.goals if goal[-1] != driver.lane_index[0][-1] or scenario != "intersection"]
        driver.plan_route_to(goals[rng.integers(len(goals))])
    if driver.route:
        driver.route[0] = (*driver.route[0][:2], None)  # a route that names its first lane forbids leaving that lane


def _vary_sizes(road: Any, rng: np.random.Generator) -> None:
    """Cars of many sizes and, one in twelve, vans and lorries; on the instance, so that nothing else changes."""
    for vehicle in road.vehicles:
        large = rng.uniform() < 1 / 12
        vehicle.LENGTH = rng.uniform(6.0, 8.0) if large else rng.uniform(4.2, 5.2)
        vehicle.WIDTH = rng.uniform(2.1, 2.4) if large else rng.uniform(1.75, 2.05)
        vehicle.diagonal = float(np.hypot(vehicle.LENGTH, vehicle.WIDTH))


def _slow_down(road: Any, setting: Setting, rng: np.random.Generator) -> None:
    """Everybody at a slow speed of their own, closing up to a car's length less than highway-env's drivers do."""
    for driver in road.vehicles:
        driver.speed = driver.target_speed = rng.uniform(*setting.speed)
        driver.DISTANCE_WANTED = driver.LENGTH + 2.0


def _remove_leavers(road: Any, traffic: Traffic) -> None:
    """Take vehicles off that went past the end of the map."""
    on_N = np.any(traffic.table.holds(traffic.along_NL, traffic.lateral_NL, margin=3.0), axis=1)
    if not on_N[: len(road.vehicles)].all():
        road.vehicles = [vehicle for vehicle, stays in zip(road.vehicles, on_N, strict=False) if stays]
        traffic.locate()


def _choose_egos(
    track: _Track, first: int, count: int, least: float, rng: np.random.Generator
) -> tuple[int, ...]:
    """Sound vehicles that moved `least` metres and had company; the stock ego first, the others by chance."""
    position_TN2 = track.box_TN6[..., :2]
    gap_TN = np.linalg.norm(position_TN2 - position_TN2[:, first : first + 1], axis=-1)
    moved_N = np.linalg.norm(position_TN2[-1] - position_TN2[0], axis=-1) > least
    near_N = gap_TN[0] < CROWD_M
    fit = np.flatnonzero(track.sound_N & moved_N & near_N)
    shuffled = rng.permutation(fit)
    chosen = [first] if first in fit else []
    return tuple(int(c) for c in [*chosen, *(c for c in shuffled if c != first)][:count])
