"""Measured latencies: the published ones of the repository, and a user's own.

`points.csv` holds what others published, with the source of every line. A line is usable for the fit where it is one
network on a GPU at known clocks whose layers are known; otherwise `reason` says why not. `protocol` names the program
that measured: "trtexec" times the engine alone, "ultralytics" times a call from Python.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from math import isfinite
from pathlib import Path

from fmdeploy.errors import ConfigError
from fmdeploy.estimate.devices import Device, device
from fmdeploy.estimate.fromonnx import read_work, work_of
from fmdeploy.estimate.fusion import TENSORRT, Rules
from fmdeploy.estimate.networks.catalogue import network
from fmdeploy.estimate.work import PRECISIONS, Precision, Work

PUBLISHED = ("model", "network", "device", "mode", "precision", "batch", "ms", "protocol", "tensorrt", "source",
             "usable", "reason")
MEASURED = ("file", "precision", "batch", "ms")
ENGINE = "trtexec"  # protocols that time the engine alone; others have an overhead of their own to be fitted
ALONE = (ENGINE, "own")


@dataclass(frozen=True)
class Point:
    """One measured latency.

    Attributes:
        model: what is left out together in cross-validation.
        rows: the work of one sample.
        ms: measured.
        protocol: "" where the engine alone was timed; otherwise the program that timed more.
    """

    model: str
    rows: tuple[Work, ...]
    device: Device
    precision: Precision
    batch: int
    ms: float
    protocol: str = ""


def published_rows() -> list[dict[str, str]]:
    """Every line of `points.csv`."""
    text = (resources.files("fmdeploy.estimate") / "points.csv").read_text(encoding="utf-8")
    return _rows(text, PUBLISHED, "points.csv")


def published_points(rules: Rules = TENSORRT) -> list[Point]:
    """The usable ones, with their networks under rules of fusion."""
    rows = [row for row in published_rows() if row["usable"] == "yes"]
    works = {name: work_of(network(name).model(), name, rules).rows for name in {row["network"] for row in rows}}
    return [_published(row, works) for row in rows]


def _published(row: Mapping[str, str], works: Mapping[str, tuple[Work, ...]]) -> Point:
    protocol = "" if row["protocol"] in ALONE else row["protocol"]
    return Point(row["network"], works[row["network"]], device(row["device"], row["mode"]),
                 _precision(row, "points.csv"), int(row["batch"]), float(row["ms"]), protocol)


def measured_points(path: Path, on: Device) -> list[Point]:
    """A user's own latencies: CSV with the columns file, precision, batch, ms; files are relative to it.

    Raises:
        ConfigError: the file is missing or not such a CSV; the text names line and column.
        ModelFileError: a model cannot be read.
    """
    if not path.is_file():
        raise ConfigError("no such file of measurements", where=path, expected=f"CSV with {','.join(MEASURED)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError("is not text", where=path, expected=f"CSV with {','.join(MEASURED)}") from error
    rows = _rows(text, MEASURED, path)
    works = {name: read_work(path.parent / name) for name in {row["file"] for row in rows}}
    return [Point(row["file"], works[row["file"]].rows, on, _precision(row, f"{path}, line {line}"),
                  int(_number(row, "batch", f"{path}, line {line}")), _number(row, "ms", f"{path}, line {line}"))
            for line, row in enumerate(rows, start=2)]


def _rows(text: str, columns: Sequence[str], where: object) -> list[dict[str, str]]:
    try:
        reader = csv.DictReader(io.StringIO(text), strict=True)
        rows = list(reader)
    except csv.Error as error:
        raise ConfigError(f"is not CSV: {error}", where=where, expected=",".join(columns)) from error
    found = tuple(name.strip() for name in reader.fieldnames or ())
    if found != tuple(columns):
        raise ConfigError("has other columns", where=where, expected=",".join(columns), found=",".join(found) or "none")
    for line, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ConfigError("has a line of another length", where=f"{where}, line {line}",
                              expected=f"{len(columns)} values")
    return [{key: value.strip() for key, value in row.items()} for row in rows]


def _precision(row: Mapping[str, str], where: object) -> Precision:
    for precision in PRECISIONS:
        if row["precision"].lower() == precision:
            return precision
    raise ConfigError("unknown precision", where=where, expected=" | ".join(PRECISIONS), found=row["precision"])


def _number(row: Mapping[str, str], column: str, where: object) -> float:
    try:
        value = float(row[column])
    except ValueError:
        value = float("nan")
    whole = column != "batch" or value == int(value if isfinite(value) else 0)
    if not isfinite(value) or value <= 0 or not whole:
        kind = "a whole number above 0" if column == "batch" else "milliseconds above 0"
        raise ConfigError(f"column {column} is not a number that can be", where=where, expected=kind, found=row[column])
    return value


def models(points: Iterable[Point]) -> list[str]:
    """Names of the models, sorted."""
    return sorted({point.model for point in points})
