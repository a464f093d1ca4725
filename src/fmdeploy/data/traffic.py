"""Steps highway-env's traffic several times faster than it does itself, to the same trajectories.

highway-env asks every lane about every vehicle, one Python call each: most of a simulation goes there. Here one
table holds the lane coordinates of all vehicles; it answers `get_closest_lane_index` and `neighbour_vehicles`,
and tells which pairs are near enough to collide. The driving itself (IDM, MOBIL, steering, dynamics, right of
way) stays highway-env's. A test compares trajectories with the unmodified road in every scenario.
"""

# N vehicles (then obstacles), L lanes

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.data.highway import Lane, lanes_of, load

END_MARGIN_M = 5.0  # AbstractLane.VEHICLE_LENGTH: a lane still holds what is this far beyond its ends


class LaneTable:
    """Lane coordinates of many positions at once: AbstractLane's formulas over arrays."""

    def __init__(self, lanes: tuple[Lane, ...]) -> None:
        self.lanes = lanes
        self.length_L = np.array([lane.length for lane in lanes])
        self.half_width_L = np.array([lane.width / 2 for lane in lanes])
        self._arcs = np.array([i for i, lane in enumerate(lanes) if lane.turn], int)
        self._straights = np.array([i for i, lane in enumerate(lanes) if not lane.turn], int)
        self._start_L2 = np.array([lane.start for lane in lanes])
        self._angle_L = np.array([lane.angle for lane in lanes])
        self._radius_L = np.array([lane.radius for lane in lanes])
        self._turn_L = np.array([lane.turn for lane in lanes])
        self._sine_L3 = np.array([lane.sine for lane in lanes])

    def coordinates(self, position_N2: Array, heading_N: Array) -> tuple[Array, Array, Array]:
        """Along (N, L) m, lateral (N, L) m and heading relative to the lane (N, L) rad in [-pi, pi)."""
        along_NL, lateral_NL, course_NL = (np.empty((len(position_N2), len(self.lanes))) for _ in range(3))
        for which, formula in ((self._straights, self._straight), (self._arcs, self._arc)):
            if len(which):
                offset_NL2 = position_N2[:, None] - self._start_L2[which]
                along_NL[:, which], lateral_NL[:, which], course_NL[:, which] = formula(which, offset_NL2)
        return along_NL, lateral_NL, _wrap(heading_N[:, None] - course_NL)

    def _straight(self, which: Array, offset_NL2: Array) -> tuple[Array, Array, Array]:
        cos, sin = np.cos(self._angle_L[which]), np.sin(self._angle_L[which])
        along = offset_NL2[..., 0] * cos + offset_NL2[..., 1] * sin
        lateral = offset_NL2[..., 1] * cos - offset_NL2[..., 0] * sin
        amplitude, pulsation, phase = self._sine_L3[which].T
        argument = pulsation * along + phase
        course = self._angle_L[which] + np.arctan(amplitude * pulsation * np.cos(argument))
        return along, lateral - amplitude * np.sin(argument), course

    def _arc(self, which: Array, offset_NL2: Array) -> tuple[Array, Array, Array]:
        start, radius, turn = self._angle_L[which], self._radius_L[which], self._turn_L[which]
        turned = _wrap(np.arctan2(offset_NL2[..., 1], offset_NL2[..., 0]) - start)
        lateral = turn * (radius - np.hypot(offset_NL2[..., 0], offset_NL2[..., 1]))
        return turn * turned * radius, lateral, start + turned + np.pi / 2 * turn

    def holds(self, along_NL: Array, lateral_NL: Array, margin: float) -> Array:
        """Bool (N, L): `AbstractLane.on_lane` with a margin in metres."""
        inside = (along_NL >= -END_MARGIN_M) & (along_NL < self.length_L + END_MARGIN_M)
        return inside & (np.abs(lateral_NL) <= self.half_width_L + margin)

    def distance(self, along_NL: Array, lateral_NL: Array, angle_NL: Array) -> Array:
        """(N, L): `AbstractLane.distance_with_heading`."""
        beyond = np.maximum(along_NL - self.length_L, 0) + np.maximum(-along_NL, 0)
        return np.asarray(np.abs(lateral_NL) + beyond + np.abs(angle_NL))


def _wrap(angle: Array) -> Array:
    return np.asarray((angle + np.pi) % (2 * np.pi) - np.pi)


class Traffic:
    """A highway-env road whose lane searches are answered from one table."""

    def __init__(self, road: Any) -> None:
        self.road = road
        self.table = LaneTable(lanes_of(road))
        self._number = {lane.index: i for i, lane in enumerate(self.table.lanes)}
        self._connected = [_connected(lane.index, self._number, road.network.graph) for lane in self.table.lanes]
        road.neighbour_vehicles = self._neighbours
        self.rules = hasattr(road, "enforce_road_rules")
        if self.rules:
            road.is_conflict_possible = self._conflict
        self.locate()

    def locate(self) -> None:
        """Take note of where everybody is and which lane is theirs. Call it after adding or moving vehicles."""
        things = self.road.vehicles + self.road.objects
        self._row = {id(thing): i for i, thing in enumerate(things)}
        self.position_N2 = np.array([thing.position for thing in things])
        heading_N = np.array([thing.heading for thing in things])
        self.along_NL, self.lateral_NL, angle_NL = self.table.coordinates(self.position_N2, heading_N)
        self.lane_N = np.argmin(self.table.distance(self.along_NL, self.lateral_NL, angle_NL), axis=1)
        self._on_NL = self.table.holds(self.along_NL, self.lateral_NL, margin=1.0)
        self._searched: dict[int, tuple[list[int], list[float]]] = {}
        for vehicle, lane in zip(self.road.vehicles, self.lane_N, strict=False):
            vehicle.lane_index = self.table.lanes[lane].index
            vehicle.lane = self.road.network.get_lane(vehicle.lane_index)

    def step(self, dt: float) -> None:
        """Let every vehicle decide, then move everybody by `dt` seconds: `road.act()` and `road.step(dt)`."""
        self.road.act()
        if self.rules:
            self._enforce_rules(dt)
        network = self.road.network
        # While the vehicles move one by one nobody asks for lanes: locate() finds them all at once afterwards.
        network.get_closest_lane_index = lambda position, heading=None: self.table.lanes[0].index
        try:
            for vehicle in self.road.vehicles:
                vehicle.step(dt)
        finally:
            del network.get_closest_lane_index
        self.locate()
        self._collide(dt)

    def _enforce_rules(self, dt: float) -> None:
        self.road.steps += 1
        if self.road.steps % int(1 / dt / self.road.REGULATION_FREQUENCY) == 0:
            self._predicted: dict[int, tuple[Array, Any]] = {}
            self.road.enforce_road_rules()

    def _conflict(self, one: Any, other: Any) -> bool | None:
        """RegulatedRoad.is_conflict_possible; each vehicle is predicted once, not once a pair."""
        (where_1, turned_1), (where_2, turned_2) = self._prediction(one), self._prediction(other)
        near = np.flatnonzero(np.hypot(*(where_2 - where_1).T) <= one.LENGTH)
        utils = load("highway_env.utils")
        for t in near:
            if utils.rotated_rectangles_intersect(
                (where_1[t], 1.5 * one.LENGTH, 0.9 * one.WIDTH, turned_1[t]),
                (where_2[t], 1.5 * other.LENGTH, 0.9 * other.WIDTH, turned_2[t]),
            ):
                return True
        return None

    def _prediction(self, vehicle: Any) -> tuple[Array, Any]:
        if id(vehicle) not in self._predicted:
            positions, headings = vehicle.predict_trajectory_constant_speed(np.arange(0.25, 3, 0.25))
            self._predicted[id(vehicle)] = np.array(positions), headings
        return self._predicted[id(vehicle)]

    def _collide(self, dt: float) -> None:
        """Road.step's collisions, asked only of pairs that pass its own spherical pre-check."""
        things = self.road.vehicles + self.road.objects
        count = len(self.road.vehicles)
        size_N = np.array([thing.diagonal for thing in things]) / 2
        reach_NN = size_N[:count, None] + size_N + np.array([v.speed for v in self.road.vehicles])[:, None] * dt
        gap_NN2 = self.position_N2[:count, None] - self.position_N2
        near_NN = np.hypot(gap_NN2[..., 0], gap_NN2[..., 1]) <= reach_NN
        for i, j in zip(*np.nonzero(np.triu(near_NN, k=1)), strict=True):
            things[i].handle_collisions(things[j], dt)

    def _neighbours(self, vehicle: Any, lane_index: Any = None) -> tuple[Any, Any]:
        """Road.neighbour_vehicles: the nearest one ahead and the nearest one behind on a lane and its neighbours."""
        lane_index = lane_index or vehicle.lane_index
        if not lane_index:
            return None, None
        lane, row = self._number[lane_index], self._row[id(vehicle)]
        rows, along = self._search(lane)
        front = bisect_left(along, float(self.along_NL[row, lane]))
        rear = front - 1
        while front < len(rows) and rows[front] == row:
            front += 1
        while rear >= 0 and rows[rear] == row:
            rear -= 1
        return self._thing(rows[front] if front < len(rows) else None), self._thing(rows[rear] if rear >= 0 else None)

    def _search(self, lane: int) -> tuple[list[int], list[float]]:
        """Rows of all things on a lane or its connected ones, by how far along (in the lane's own coordinate)."""
        if lane not in self._searched:
            along_N = np.full(len(self.position_N2), np.nan)
            for other, offset in reversed(self._connected[lane]):
                on_N = self._on_NL[:, other]
                along_N[on_N] = self.along_NL[on_N, other] + offset
            rows = np.argsort(along_N)[: int(np.count_nonzero(~np.isnan(along_N)))]  # NaN comes last
            self._searched[lane] = rows.tolist(), along_N[rows].tolist()
        return self._searched[lane]

    def _thing(self, row: int | None) -> Any:
        count = len(self.road.vehicles)
        if row is None:
            return None
        return self.road.vehicles[row] if row < count else self.road.objects[row - count]


def _connected(index: tuple[str, str, int], number: dict[Any, int], graph: Any) -> list[tuple[int, float]]:
    """The lane itself, those that follow and those that lead to it, each with its offset, in the order of search."""
    start, end, rank = index
    lane = graph[start][end][rank]
    found: list[tuple[int, float]] = [(number[index], 0.0)]
    for after, lanes in graph.get(end, {}).items():
        found.append((number[end, after, rank if rank < len(lanes) else 0], float(lane.length)))
    for before, ends in graph.items():
        if start in ends:
            chosen = rank if rank < len(ends[start]) else 0
            found.append((number[before, start, chosen], -float(ends[start][chosen].length)))
    return found
