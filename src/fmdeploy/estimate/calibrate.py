"""`fmdeploy estimate --calibrate`: constants from latencies that a user measured on an own board."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import exp
from pathlib import Path

import numpy as np

from fmdeploy.command import Outcome
from fmdeploy.errors import ConfigError
from fmdeploy.estimate.devices import device_file, resolve
from fmdeploy.estimate.fit import OWN_FLOOR, fit, left_out_errors, require_enough
from fmdeploy.estimate.points import Point, measured_points, models
from fmdeploy.estimate.solver import belief_of
from fmdeploy.estimate.tables import device_toml
from fmdeploy.files import write_atomically

BELIEF = 0.1  # a few measurements move the device's constants, they do not replace them


def calibrate(table: Path, name: str, mode: str | None, out: Path | None) -> Outcome:
    """Fit a device to the measurements in `table`, and write it to `out`.

    Raises:
        ConfigError: there is no `out`, or too little or no valid data.
    """
    if out is None:
        raise ConfigError("--calibrate needs --out", fix="Name the device file to write, such as my-orin.toml")
    if out.suffix != ".toml":
        raise ConfigError("a device file ends in .toml", where=out)
    file = device_file(name)
    on = resolve(file, mode)
    points = measured_points(table, on)
    require_enough(points)
    count = f"{len(points)} points of {len(models(points))} models"
    belief = belief_of(on.constants, BELIEF)
    constants = fit(points, source=f"{count} from {table.name}, mode {on.mode}", floor=OWN_FLOOR, belief=belief)
    own = file.model_copy(update={"name": out.stem, "fit": constants, "default_mode": on.mode})
    write_atomically(out, device_toml(own))
    errors = left_out_errors(points, belief=belief)
    sizes = np.abs(np.expm1(errors))
    return Outcome((f"wrote {out}: {count}, left-out error median {np.median(sizes):.1%}, largest {sizes.max():.1%}",
                    *_lines(points, errors)),
                   {"path": str(out), "points": len(points), "models": len(models(points)),
                    "median_error": float(np.median(sizes)), "largest_error": float(sizes.max()),
                    "residuals": [_residual(point, error) for point, error in zip(points, errors, strict=True)],
                    "constants": constants.model_dump(mode="json")})


def _residual(point: Point, error: float) -> dict[str, object]:
    return {"file": point.model, "precision": point.precision, "batch": point.batch, "measured_ms": point.ms,
            "predicted_ms": point.ms * exp(error)}


def _lines(points: Sequence[Point], errors: Sequence[float]) -> Iterator[str]:
    for point, error in zip(points, errors, strict=True):
        yield (f"  {point.model} {point.precision} batch {point.batch}: measured {point.ms:.3f} ms, predicted from the "
               f"other models {point.ms * exp(error):.3f} ms ({exp(error) - 1:+.1%})")
