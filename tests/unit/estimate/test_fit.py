"""The fit finds what was planted, its bands hold what they should, and the stored constants are its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import exp

import numpy as np
import pytest

from fmdeploy.errors import ConfigError
from fmdeploy.estimate.constants import Constants, Efficiency
from fmdeploy.estimate.devices import constants_of, device, device_names
from fmdeploy.estimate.fit import (
    OWN_FLOOR,
    PUBLISHED_FLOOR,
    Held,
    by_family,
    cross_validate,
    fit,
    fit_published,
    left_out_errors,
    spread_of,
)
from fmdeploy.estimate.points import Point, published_points, published_rows
from fmdeploy.estimate.roofline import predict
from fmdeploy.estimate.solver import belief_of
from fmdeploy.estimate.work import PRECISIONS, Work

PLANTED = Efficiency(fp32=0.3, fp16=0.6, int8=0.4)


@pytest.fixture(scope="module")
def published() -> list[Point]:
    return published_points()


@pytest.fixture(scope="module")
def held(published: list[Point]) -> list[Held]:
    return cross_validate(published, floor=PUBLISHED_FLOOR)


def test_the_stored_constants_are_the_fit(published: list[Point]) -> None:
    stored, found = constants_of("orin"), fit_published(published)
    assert stored.source == found.source
    assert stored.model_dump(exclude={"source"}) == _close(found.model_dump(exclude={"source"}))


def test_models_that_were_left_out_are_predicted(held: list[Held]) -> None:
    sizes = [abs(exp(one.error) - 1) for one in held]
    assert np.median(sizes) <= 0.15
    assert np.mean([size <= 0.35 for size in sizes]) >= 0.9
    assert np.mean([abs(one.error) <= one.width for one in held]) >= 0.9


def test_families_that_were_left_out_are_predicted(published: list[Point]) -> None:
    assert {by_family(point) for point in published} == {"resnet", "vit", "yolo11", "yolov8", "yolov5", "centerpoint"}
    sizes = [abs(exp(error) - 1) for error in left_out_errors(published, by_family)]
    assert np.median(sizes) <= 0.15
    assert np.mean([size <= 0.35 for size in sizes]) >= 0.9


def test_what_the_published_points_say_of_themselves() -> None:
    rows = published_rows()
    usable = [row for row in rows if row["usable"] == "yes"]
    assert len(usable) >= 45
    for row in rows:
        assert row["source"]
        assert row["device"] in device_names()
        assert float(row["ms"]) > 0
        assert (row["usable"] == "yes") != bool(row["reason"])
    for row in usable:
        assert row["network"]
        assert "DLA" not in row["model"]
        assert row["protocol"] != "end-to-end"


def test_planted_constants_are_recovered_from_noisy_points() -> None:
    constants = fit(_points(noise=0.05), source="planted", floor=OWN_FLOOR)
    for name in PRECISIONS:
        assert getattr(constants.compute, name) == pytest.approx(getattr(PLANTED, name), rel=0.1)
    assert constants.memory == pytest.approx(0.8, rel=0.1)
    assert constants.launch_us == pytest.approx(20.0, rel=0.15)
    assert constants.overhead_ms["ultralytics"] == pytest.approx(3.0, rel=0.2)


def test_one_wild_point_does_not_move_the_fit() -> None:
    points = _points(noise=0.02)
    points[5] = replace(points[5], ms=points[5].ms * 10)
    constants = fit(points, source="planted", floor=OWN_FLOOR)
    for name in PRECISIONS:
        assert getattr(constants.compute, name) == pytest.approx(getattr(PLANTED, name), rel=0.12)


def test_the_fit_does_not_depend_on_the_order_of_the_points() -> None:
    points = _points(noise=0.05)
    one, other = (fit(p, source="planted", floor=OWN_FLOOR) for p in (points, points[::-1]))
    assert one.model_dump() == _close(other.model_dump())


def test_bands_hold_nine_of_ten_left_out_points() -> None:
    held = cross_validate(_points(noise=0.1), floor=OWN_FLOOR)
    inside = [abs(one.error) <= one.width for one in held]
    assert np.mean(inside) >= 0.9
    assert np.mean([one.width for one in held]) < 0.4  # and are not simply huge


def test_the_spread_is_a_conformal_quantile() -> None:
    errors = [k / 100 for k in range(1, 100)]
    assert spread_of(errors, [False] * 99, 0.0)[0] == pytest.approx(0.95)
    assert spread_of(errors, [False] * 99, 0.0)[1] == pytest.approx(1.5 * 0.95)
    assert spread_of([0.01, -0.02], [False, True], 0.2) == pytest.approx((0.2, 0.3))


def test_what_few_points_leave_open_stays_as_believed() -> None:
    points = [point for point in _points(noise=0.0) if point.precision == "fp16" and not point.protocol]
    believed = constants_of("orin")
    constants = fit(points, source="own board", floor=OWN_FLOOR, belief=belief_of(believed, 0.3))
    assert constants.compute.int8 == pytest.approx(believed.compute.int8, rel=1e-3)
    assert constants.compute.fp16 == pytest.approx(PLANTED.fp16, rel=0.15)


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ConfigError, match="too few measurements for a fit"):
        fit(_points(noise=0.0)[:5], source="x", floor=OWN_FLOOR)
    same = [replace(point, model="one") for point in _points(noise=0.0)]
    with pytest.raises(ConfigError, match="too few measurements for a fit"):
        fit(same, source="x", floor=OWN_FLOOR)


def test_times_in_another_unit_are_refused() -> None:
    points = [replace(point, ms=point.ms / 1e3, protocol="") for point in _points(noise=0.0)]
    with pytest.raises(ConfigError, match=r"do not fit the device: .* that times are milliseconds"):
        fit(points, source="x", floor=OWN_FLOOR)


def _close(values: object) -> object:
    """The same structure with numbers that compare within a thousandth."""
    if isinstance(values, dict):
        return {key: _close(value) for key, value in values.items()}
    return pytest.approx(values, rel=1e-3) if isinstance(values, float) else values


def _points(noise: float) -> list[Point]:
    """Latencies of made-up networks by planted constants, on two boards, some with a program's overhead."""
    rng = np.random.default_rng(3)
    points = []
    for model in range(10):
        rows = _network(rng, model)
        for name in ("orin-nano-super", "orin-agx-64"):
            believed = device(name)
            on = replace(believed, constants=_planted(believed.constants))
            for precision in PRECISIONS:
                protocol = "ultralytics" if model % 3 == 0 else ""
                ms = predict(rows, on, precision, 1 + model % 2 * 7).p50_ms + (3.0 if protocol else 0.0)
                points.append(Point(f"net{model}", rows, believed, precision, 1 + model % 2 * 7,
                                    ms * float(np.exp(noise * rng.standard_normal())), protocol))
    return points


def _planted(constants: Constants) -> Constants:
    return constants.model_copy(update={"compute": PLANTED, "memory": 0.8, "launch_us": 20.0})


def _network(rng: np.random.Generator, model: int) -> tuple[Work, ...]:
    """Kernels of all three kinds: bound by compute, by memory, by the launch."""
    big, wide, small = rng.integers(5, 40, 3)
    rows: Sequence[Work] = [
        *[Work(f"c{k}", "conv", macs=int(rng.uniform(0.2e9, 2e9)), weights=10**5, reads=10**5, writes=10**5)
          for k in range(big)],
        *[Work(f"p{k}", "pointwise", reads=int(rng.uniform(1e6, 1e7)), writes=10**6) for k in range(wide)],
        *[Work(f"s{k}", "conv", macs=10**5, reads=10**3, writes=10**3) for k in range(small * (model + 1))]]
    return tuple(rows)
