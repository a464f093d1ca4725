"""A sensor that is not there, and a rig that is not the one the model was made for.

A frame without one of its inputs runs only where the bundle's budgets declare a mode for exactly that loss, which says
what fills the gap; `check` measures what the mode costs. Nothing is filled in silence: the frame carries SENSOR_MODE.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.budgets import SensorLoss
from fmdeploy.errors import ArtifactError
from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.runtime.bundle import InputStatistics
from fmdeploy.runtime.frame import Finding, Reason


class SensorModes:
    """The declared modes of one bundle."""

    def __init__(
        self, io: IOSpec, statistics: Mapping[str, InputStatistics], declared: Mapping[str, SensorLoss]
    ) -> None:
        """Prepare what fills each gap.

        Raises:
            ArtifactError: A mode is declared for an input that the model does not have.
        """
        specs = {spec.name: spec for spec in io.inputs}
        if unknown := declared.keys() - specs.keys():
            raise ArtifactError("declares the loss of an input that io.json lacks", where="budgets.toml: sensor_loss",
                                expected=", ".join(sorted(specs)), found=", ".join(sorted(unknown)))
        self._declared = dict(declared)
        self._fills: Arrays = {name: fill(specs[name], statistics[name], mode) for name, mode in declared.items()}

    def judge(self, missing: Collection[str], found: list[Finding]) -> Arrays | None:
        """Return what fills the gaps, by name; None where the frame must not run. Append the finding that says so."""
        names = ", ".join(sorted(missing))
        if len(missing) > 1:
            found.append(Finding(Reason.SENSOR_MISSING, f"{names}: more than one sensor is missing"))
            return None
        name = next(iter(missing))
        mode = self._declared.get(name)
        if mode is None:
            found.append(Finding(Reason.SENSOR_MISSING, f"{name}: the bundle declares no mode without it"))
            return None
        found.append(Finding(Reason.SENSOR_MODE, f"{name}: missing, filled with {mode.fill} as the bundle declares"))
        return {name: self._fills[name]}


def fill(spec: TensorSpec, statistics: InputStatistics, mode: SensorLoss) -> Array:
    """Return what the model sees instead of a sensor: zeros, or every channel at its calibration mean."""
    filled = np.zeros(spec.shape, spec.dtype)
    if mode.fill == "calibration-mean":
        means = np.asarray(statistics.channel_mean)
        shape = (len(means), *(1 for _ in spec.shape[1:])) if len(spec.shape) > 1 else (1,)
        filled[:] = means.reshape(shape)
    return filled


def check_rig(io: IOSpec, rig: Mapping[str, str]) -> None:
    """Compare a vehicle's sensors with those that the model was made for.

    Args:
        io: The bundle's; a bundle that names no rig fits any.
        rig: Name of a sensor to the sha256 of its calibration (intrinsics, extrinsics, mounting).

    Raises:
        ArtifactError: A sensor is missing, or has another calibration: other, or swapped.
    """
    for sensor, digest in io.rig.items():
        found = rig.get(sensor)
        if found == digest:
            continue
        swapped = next((name for name, other in rig.items() if other == digest), None)
        what = f"sensor {sensor!r} is not the one that the model was made for"
        if swapped is not None:
            what += f": its calibration is that of {swapped!r}, are the two swapped?"
        raise ArtifactError(what, where="rig", expected=digest, found=found or "no such sensor",
                            fix="Mount the sensors as the bundle's io.json says, or export for this rig")
