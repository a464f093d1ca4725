"""The parking lot, and vehicles that stand: in stalls, or along the kerbs of a cluttered road.

highway-env's `ParkingEnv` is two rows of 14 stalls with bare ground between them, made for one manoeuvring car. Two
lanes a direction are laid over that ground and a little beyond it, so that traffic can pass through the lot.
"""

# P points; world frame, metres and radians

from __future__ import annotations

from typing import Any

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.data.highway import Lane, add_straight, lanes_of, new_parked
from fmdeploy.data.traffic import LaneTable

STALLS = (("a", "b"), ("b", "c"))
AISLES = (("west", "east"), ("east", "west"))
AISLE_M = 130.0
"""Length of an aisle; its middle is the lot's."""
AISLE_WIDTH_M = 5.0  # four of them cover the 20 m between the rows
KERB_M = 1.7  # from a lane's edge to the middle of what is parked beside it
KERB_SPACING_M = 6.5
STALL_USE_M = 0.4  # nobody parks quite in the middle


def pave(road: Any) -> None:
    """Give the lot its aisles, and take away the mark where highway-env wants its ego to park."""
    road.objects.clear()
    half = AISLE_M / 2
    for across in (1.5, 0.5):  # rank 0 is the outer lane of either direction
        y = across * AISLE_WIDTH_M
        add_straight(road, "west", "east", ((-half, y), (half, y)), AISLE_WIDTH_M)
        add_straight(road, "east", "west", ((half, -y), (-half, -y)), AISLE_WIDTH_M)


def park(road: Any, count: int, near: Array, reach: float, rng: np.random.Generator) -> None:
    """Put up to `count` standing vehicles on the road: into stalls where there are any, else along the kerbs.

    Args:
        road: highway-env's road.
        count: How many; fewer where there is no more room.
        near: World position (2,) that they are to be near.
        reach: How near, in metres.
        rng: Decides places and sizes.
    """
    lanes = lanes_of(road)
    places = [place for lane in lanes for place in _stalls(lane)] or _kerbs(lanes)
    places = [place for place in places if np.hypot(*(place[:2] - near)) < reach]
    for number in rng.permutation(len(places))[:count]:
        x, y, heading = places[number]
        length, width, shift = rng.uniform(4.2, 5.2), rng.uniform(1.75, 2.05), rng.uniform(-STALL_USE_M, STALL_USE_M)
        position = np.array([x + shift * np.cos(heading), y + shift * np.sin(heading)])
        turned = heading + np.pi * (rng.uniform() < 0.5)  # nose or tail first
        things = [*road.vehicles, *road.objects]
        if all(_is_clear(thing, position, heading, (thing.LENGTH + length) / 2) for thing in things):
            road.objects.append(new_parked(road, position, turned, length, width))


def _stalls(lane: Lane) -> list[Array]:
    """Place (3,) x, y, heading in the stall, if the lane is one."""
    if lane.index[:2] not in STALLS:
        return []
    [middle] = lane.points(np.array([lane.length / 2]), np.zeros(1))
    return [np.array([*middle, lane.angle])]


def _kerbs(lanes: tuple[Lane, ...]) -> list[Array]:
    """Places (3,) x, y, heading beside straight lanes that are on no lane."""
    found = []
    for lane in lanes:
        if not lane.turn:
            along_P = np.arange(3.0, min(lane.length, 400.0) - 3.0, KERB_SPACING_M)
            for side in (-1, 1):
                point_P2 = lane.points(along_P, np.full_like(along_P, side * (lane.width / 2 + KERB_M)))
                found += [np.array([x, y, lane.angle]) for x, y in point_P2]
    if not found:
        return []
    table, place_P3 = LaneTable(lanes), np.array(found)
    along_PL, lateral_PL, _ = table.coordinates(place_P3[:, :2], place_P3[:, 2])
    return list(place_P3[~table.holds(along_PL, lateral_PL, margin=KERB_M - 0.3).any(axis=1)])


def _is_clear(thing: Any, position: Array, heading: float, length: float) -> bool:
    """Whether `thing` is more than `length` metres away from a place, or at least 2.4 m to its side."""
    offset = thing.position - position
    across = offset[1] * np.cos(heading) - offset[0] * np.sin(heading)
    return bool(np.hypot(*offset) > length or abs(across) > 2.4)
