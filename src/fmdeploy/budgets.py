"""`budgets.toml`: what a bundle must keep to be allowed on a vehicle.

    size_mib = 4.0                      # every model file

    [accuracy]
    metric = "iou"
    max_drop_vs_teacher = 0.08          # relative to the teacher's value
    max_drop_vs_fp32 = 0.01             # relative, quantised tiers only
    max_slice_drop = 0.03               # the same, in every slice of `slices`
    min_samples = 200
    min_groups = 6                      # simulations, not frames
    confidence = 0.95

    [target.cpu]                        # one table a target machine; on a Jetson with power_mode = "25W"
    p50_ms = 10.0
    p99_ms = 40.0
    peak_mib = 400.0

    [sensor_loss.camera]                # the model may run without this input; one table a declared mode
    fill = "zeros"                      # what it sees instead
    max_drop = 0.25                     # relative to the same tier with all inputs

A limit that is left out is not gated and gives no row. A limit that is there is measured or not passed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from fmdeploy.errors import ConfigError
from fmdeploy.record import Field, Record, read_record
from fmdeploy.tomlfile import parse_toml, read_toml

SLICES = ("scenario", "weather", "rare")


class AccuracyBudget(Record):
    """Limits on how much a model may lose. Drops are relative: 0.01 is one percent of the reference's value."""

    metric: str = Field(min_length=1, description="Name of one of the task's metrics")
    max_drop_vs_teacher: float | None = Field(default=None, ge=0, lt=1)
    max_drop_vs_fp32: float | None = Field(default=None, ge=0, lt=1)
    max_slice_drop: float | None = Field(default=None, ge=0, lt=1, description="Against FP32, in every slice")
    max_slice_drop_vs_teacher: float | None = Field(default=None, ge=0, lt=1)
    min_samples: int = Field(default=200, ge=2, description="Fewer samples than this: not measured")
    min_slice_samples: int = Field(default=100, ge=2, description="The same for one slice")
    min_groups: int = Field(
        default=6, ge=2, description="Fewer independent groups (simulations) than this cannot pass: not measured"
    )
    required_slices: tuple[str, ...] = Field(
        default=(), description="Slices that must be measured, such as 'rare'; other small slices do not block"
    )
    slices: tuple[str, ...] = Field(default=SLICES, description="Slice axes under the gate")
    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="Two-sided coverage of the intervals")
    max_invalid_share: float = Field(
        default=0.01, ge=0, le=1, description="Share of the evaluation's frames that the guards may call not valid"
    )


class TargetBudget(Record):
    """Limits on one target machine."""

    machine: str | None = Field(default=None, description="`uname -m` of the target; elsewhere nothing is measured")
    power_mode: str | None = Field(
        default=None, min_length=1, description="Name of the board's power mode, such as '25W'; in others: not measured"
    )
    p50_ms: float | None = Field(default=None, gt=0, description="Median of Runtime.infer, guards included")
    p99_ms: float | None = Field(default=None, gt=0)
    peak_mib: float | None = Field(
        default=None, gt=0, description="Peak memory of a fresh process; on a Jetson with what the GPU takes"
    )


class SensorLoss(Record):
    """A declared mode: frames without one input run, and what that costs is measured."""

    fill: Literal["zeros", "calibration-mean"] = Field(description="What the model sees instead of the sensor")
    max_drop: float = Field(ge=0, lt=1, description="Against the same tier with all inputs")


class Budgets(Record):
    """The whole file."""

    accuracy: AccuracyBudget
    target: dict[str, TargetBudget] = Field(default_factory=dict)
    size_mib: float | None = Field(default=None, gt=0, description="Largest size of one model file")
    sensor_loss: dict[str, SensorLoss] = Field(
        default_factory=dict, description="Inputs that may be missing; a frame without any other is not valid"
    )

    def for_target(self, name: str | None) -> tuple[str, TargetBudget]:
        """Return the target called `name`; without a name, the only one, or an empty one where there is none.

        Raises:
            ConfigError: There is no such target, or the choice is not clear.
        """
        if name is None and len(self.target) <= 1:
            return next(iter(self.target.items()), ("cpu", TargetBudget()))
        if name is None or name not in self.target:
            raise ConfigError(
                "choose a target of the budgets", expected=" or ".join(self.target) or "none", found=name,
                fix="Name it with --target",
            )
        return name, self.target[name]

    def to_toml(self) -> str:
        """Return the file's text; `read_budgets` gives back an equal object."""
        return "\n".join(_lines(self)) + "\n"


def read_budgets(path: Path) -> Budgets:
    """Read a budgets file.

    Raises:
        ConfigError: It is missing, is not TOML, or has unknown keys or values out of range; all are named.
    """
    return read_record(Budgets, read_toml(path), where=path)


def parse_budgets(raw: bytes, path: Path) -> Budgets:
    """Read the bytes of a budgets file, which were verified; `path` is for messages.

    Raises:
        ConfigError: They are not TOML, or have unknown keys or values out of range.
    """
    return read_record(Budgets, parse_toml(raw, path), where=path)


def _lines(budgets: Budgets) -> Iterator[str]:
    if budgets.size_mib is not None:
        yield f"size_mib = {budgets.size_mib!r}"
    yield "\n[accuracy]"
    yield from _table(budgets.accuracy)
    for name, target in budgets.target.items():
        yield f"\n[target.{_quoted(name)}]"
        yield from _table(target)
    for name, loss in budgets.sensor_loss.items():
        yield f"\n[sensor_loss.{_quoted(name)}]"
        yield from _table(loss)


def _table(table: Record) -> Iterator[str]:
    for key, value in table.model_dump(mode="json").items():
        if isinstance(value, str):
            yield f"{key} = {_quoted(value)}"
        elif isinstance(value, list):
            yield f"{key} = [{', '.join(map(_quoted, value))}]"
        elif value is not None:
            yield f"{key} = {value!r}"


def _quoted(text: str) -> str:
    """A TOML basic string. JSON escapes the same characters, but for DEL; TOML forbids escaped surrogates."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
