"""Devices are data: one TOML file a device with its power modes, one a family of fitted constants.

    name = "orin-nano-super"
    title = "Jetson Orin Nano 8GB at Super clocks"
    default_mode = "MAXN_SUPER"
    dla = "none"
    fit = "orin"                       # a built-in family, or a table [fit] in the file itself

    [operations]                       # dense operations of one matrix unit a clock; a multiply-add counts as two
    fp32 = 256
    fp16 = 512
    int8 = 1024
    source = "…"
    confidence = "datasheet"           # datasheet | computed | reported | unverified

    [[mode]]
    name = "MAXN_SUPER"
    matrix_units = 32
    clock_mhz = 1020.0
    dram_gb_s = 102.4
    source = "…"
    confidence = "datasheet"

A device without such units gives `peak_gops = { fp32 = …, fp16 = …, int8 = … }` in every mode instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fmdeploy.config import read_toml, validate
from fmdeploy.errors import ConfigError
from fmdeploy.estimate.constants import Constants
from fmdeploy.estimate.work import PRECISIONS, Precision

Confidence = Literal["datasheet", "computed", "reported", "unverified"]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Operations(_Table):
    """Dense operations of one matrix unit a clock."""

    fp32: float = Field(gt=0)
    fp16: float = Field(gt=0)
    int8: float = Field(gt=0)
    source: str = Field(min_length=1)
    confidence: Confidence


class Peaks(_Table):
    """Dense operations a second, in units of 10⁹."""

    fp32: float = Field(gt=0)
    fp16: float = Field(gt=0)
    int8: float = Field(gt=0)


class Mode(_Table):
    """One power mode."""

    name: str = Field(min_length=1)
    matrix_units: int | None = Field(default=None, gt=0)
    clock_mhz: float | None = Field(default=None, gt=0)
    peak_gops: Peaks | None = None
    dram_gb_s: float = Field(gt=0)
    source: str = Field(min_length=1)
    confidence: Confidence

    @model_validator(mode="after")
    def _has_one_peak(self) -> Mode:
        units = self.matrix_units is not None and self.clock_mhz is not None
        if units == (self.peak_gops is not None):
            raise ValueError("give either matrix_units and clock_mhz, or peak_gops")
        return self


class DeviceFile(_Table):
    """A whole device file."""

    name: str = Field(min_length=1)
    title: str = Field(min_length=1)
    default_mode: str
    dla: str = Field(default="", description="What is known of its deep-learning accelerators, which are not predicted")
    fit: str | Constants
    operations: Operations | None = None
    mode: tuple[Mode, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_whole(self) -> DeviceFile:
        names = [mode.name for mode in self.mode]
        if len(set(names)) != len(names):
            raise ValueError("two modes have the same name")
        if self.default_mode not in names:
            raise ValueError(f"default_mode {self.default_mode!r} is none of the modes {', '.join(names)}")
        if self.operations is None and any(mode.peak_gops is None for mode in self.mode):
            raise ValueError("a mode with matrix_units needs the table [operations]")
        return self


@dataclass(frozen=True)
class Device:
    """A device in one power mode.

    Attributes:
        peak: dense operations a second by precision.
        bandwidth: bytes a second between the processor and its memory, by data sheet.
        constants: the fitted efficiencies.
        clock_mhz: of the matrix units; None where the file gives peaks instead.
        confidence: the weakest one of the numbers above.
        rest: precision of what stays in float when INT8 is asked for.
        overlap: 1 where memory traffic hides behind arithmetic (or the other way round), 0 where their times add.
        rates: kinds of memory-only kernels whose speed was measured → elements read and written a second.
    """

    name: str
    mode: str
    peak: Mapping[Precision, float]
    bandwidth: float
    constants: Constants
    clock_mhz: float | None = None
    confidence: str = "computed"
    title: str = ""
    rest: Precision = "fp16"
    rates: Mapping[str, float] = field(default_factory=dict)
    overlap: float = 1.0

    @property
    def launch(self) -> float:
        """Seconds of one more kernel, at this mode's clock."""
        reference = self.constants.launch_clock_mhz
        scale = reference / self.clock_mhz if reference and self.clock_mhz else 1.0
        return self.constants.launch_us * 1e-6 * scale


def device(name: str | Path, mode: str | None = None) -> Device:
    """Return the built-in device called `name`, or the one of the file `name` (it ends in .toml).

    Args:
        name: such as "orin-nano-super", or a path.
        mode: a power mode such as "15W"; None means the device's default.

    Raises:
        ConfigError: there is no such device or mode (near names are listed), or the file is not a device.
    """
    return resolve(device_file(name), mode)


def device_names() -> tuple[str, ...]:
    """Names of the built-in devices."""
    return _toml_names("fmdeploy.estimate.boards")


def device_file(name: str | Path) -> DeviceFile:
    """Read a device file, by built-in name or by path.

    Raises:
        ConfigError: there is none, or it is not valid.
    """
    if str(name).endswith(".toml"):
        return validate(DeviceFile, read_toml(Path(name)), where=name)
    known = device_names()
    if str(name) not in known:
        raise ConfigError(f"unknown device {str(name)!r}{_near(str(name), known)}", expected=" | ".join(known),
                          fix="Or give the path of a device file that ends in .toml")
    with resources.as_file(resources.files("fmdeploy.estimate.boards") / f"{name}.toml") as path:
        return validate(DeviceFile, read_toml(path), where=path.name)


def constants_of(family: str) -> Constants:
    """The fitted constants of a built-in family, such as "orin".

    Raises:
        ConfigError: there is no such family.
    """
    known = _toml_names("fmdeploy.estimate.fits")
    if family not in known:
        raise ConfigError(f"unknown family of constants {family!r}", expected=" | ".join(known) + " or a table [fit]")
    with resources.as_file(resources.files("fmdeploy.estimate.fits") / f"{family}.toml") as path:
        return validate(Constants, read_toml(path), where=path.name)


def resolve(file: DeviceFile, mode: str | None = None) -> Device:
    """The device of `file` in one of its modes."""
    names = [one.name for one in file.mode]
    wanted = mode or file.default_mode
    chosen = next((one for one in file.mode if one.name.lower() == wanted.lower()), None)
    if chosen is None:
        raise ConfigError(f"{file.name} has no power mode {wanted!r}{_near(wanted, names)}", expected=" | ".join(names))
    constants = constants_of(file.fit) if isinstance(file.fit, str) else file.fit
    return Device(file.name, chosen.name, _peaks(file, chosen), chosen.dram_gb_s * 1e9, constants, chosen.clock_mhz,
                  _weakest(file, chosen), file.title)


def _toml_names(package: str) -> tuple[str, ...]:
    items = resources.files(package).iterdir()
    return tuple(sorted(item.name.removesuffix(".toml") for item in items if item.name.endswith(".toml")))


def _peaks(file: DeviceFile, mode: Mode) -> dict[Precision, float]:
    if mode.peak_gops is not None:
        return {p: getattr(mode.peak_gops, p) * 1e9 for p in PRECISIONS}
    units = (mode.matrix_units or 0) * (mode.clock_mhz or 0) * 1e6  # the file's own check holds both
    return {p: getattr(file.operations, p) * units for p in PRECISIONS}


def _weakest(file: DeviceFile, mode: Mode) -> str:
    order = ("datasheet", "computed", "reported", "unverified")
    said = [mode.confidence] + ([file.operations.confidence] if file.operations else [])
    return max(said, key=order.index)


def _near(name: str, known: Sequence[str]) -> str:
    spelt = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), list(spelt), n=3, cutoff=0.4)
    return f", did you mean {' or '.join(repr(spelt[one]) for one in near)}?" if near else ""
